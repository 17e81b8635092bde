//! What the benches share: tables, budgets, and figures of a child process.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints what it measures")]

use std::{
    collections::VecDeque,
    env,
    fmt::Write as _,
    fs,
    process::{Command, Stdio},
    sync::Mutex,
    thread,
};

/// Prints a title, the heads of columns, and rows. The first column is aligned to the left.
pub fn table(title: &str, heads: &[impl AsRef<str>], rows: &[Vec<String>]) {
    let heads: Vec<_> = heads.iter().map(|head| head.as_ref().to_owned()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.chain([&heads[column]]).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..heads.len()).map(width).collect();
    let print = |cells: &[String]| {
        let mut line = String::new();
        for (column, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let written = match column {
                0 => write!(line, "{cell:<width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
            written.expect("a string takes all");
        }
        println!("{}", line.trim_end());
    };
    println!("\n## {title}\n");
    print(&heads);
    println!("{}", "-".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1)));
    for row in rows {
        print(row);
    }
}

/// What design promises, and what was measured.
#[derive(Debug, Default)]
pub struct Budgets(Vec<Vec<String>>);

impl Budgets {
    /// `value` may be so much at `most`. Prints `digits` after the point.
    pub fn most(&mut self, what: &str, value: f64, most: f64, digits: usize) {
        let verdict = if value <= most { "ok" } else { "OVER" };
        self.0.push(vec![
            what.to_owned(),
            format!("{value:.digits$}"),
            format!("{most:.digits$}"),
            verdict.to_owned(),
        ]);
    }

    /// Prints them.
    pub fn print(&self) {
        table("Budgets", &["what", "measured", "at most", ""], &self.0);
        println!();
    }
}

/// The middle one.
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 50.0)
}

/// The value that so many percent are not above.
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index, of not so many values"
    )]
    let at = (values.len() as f64 * percent / 100.0) as usize;
    values[at.min(values.len() - 1)]
}

/// `1234567` as `1,234,567`.
pub fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::from(if value < -0.5 { "-" } else { "" });
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The arguments that are meant for the bench: cargo adds `--bench`.
pub fn args() -> Vec<String> {
    env::args().skip(1).filter(|arg| arg != "--bench").collect()
}

/// This program, to be measured in a process of its own.
pub fn this_program() -> Command {
    let mut command = Command::new(env::current_exe().expect("a program has a path"));
    // A backtrace of each panic costs more than all else.
    command.env_remove("RUST_BACKTRACE").env_remove("RUST_LIB_BACKTRACE");
    command
}

/// Runs this program with these arguments, and reads the numbers that it prints.
pub fn numbers_of(args: &[&str]) -> Vec<f64> {
    numbers(this_program().args(args))
}

/// Runs a command, and reads the numbers that it prints.
pub fn numbers(command: &mut Command) -> Vec<f64> {
    let output = command.stderr(Stdio::inherit()).output().expect("it runs");
    assert!(output.status.success(), "{command:?}: {}", output.status);
    let text = String::from_utf8(output.stdout).expect("it prints numbers");
    text.split_whitespace().map(|number| number.parse().expect("a number")).collect()
}

/// Whether valgrind is here; says so if not.
pub fn has_valgrind() -> bool {
    let found = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status();
    let found = found.is_ok_and(|status| status.success());
    if !found {
        eprintln!(
            "\nInstructions are not counted, for there is no valgrind: `apt install valgrind`, or \
             the like, on Linux."
        );
    }
    found
}

/// This program under callgrind.
pub fn this_program_under_callgrind() -> Command {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command.arg(this_program().get_program());
    command
}

/// The total that callgrind tells in the end.
pub fn total_of(stderr: &[u8]) -> f64 {
    let stderr = String::from_utf8_lossy(stderr);
    let total = stderr.lines().find_map(|line| line.split("Collected : ").nth(1));
    let total = total.and_then(|total| total.trim().parse().ok());
    total.unwrap_or_else(|| panic!("callgrind has told no total:\n{stderr}"))
}

/// Maps on all cores. The order stays.
pub fn on_all_cores<T: Sync, R: Send>(items: &[T], map: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let todo = Mutex::new((0..items.len()).collect::<VecDeque<_>>());
    let done = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let next = todo.lock().expect("nobody panics with it").pop_front();
                    let Some(at) = next else { break };
                    let result = map(&items[at]);
                    done.lock().expect("nobody panics with it").push((at, result));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("nobody panicked with it");
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

/// A figure of `/proc/self/status` in bytes, such as `VmRSS`; 0 where there is none.
pub fn of_this_process(figure: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(figure)?.strip_prefix(':'));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    kilobytes.unwrap_or(0.0) * 1024.0
}
