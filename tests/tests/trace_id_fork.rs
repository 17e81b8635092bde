//! Ids after a fork, of which the child has all memory of its parent. On its own, since to fork is
//! safe in a process of one thread alone, which libtest's is not.
#![allow(missing_docs, clippy::unwrap_used)] // Tests.

fn main() {
    #[cfg(unix)]
    forked_processes_draw_other_ids();
}

#[cfg(unix)]
fn forked_processes_draw_other_ids() {
    use std::{
        collections::BTreeSet,
        io::{Read, Write, pipe},
        process::exit,
    };

    use fork::{Fork, fork, waitpid};
    use tower_tasks::TraceContext;

    const EACH: usize = 100;
    let draw = || {
        let context = TraceContext::start();
        let call = context.to_trace_parent();
        format!("{} {}\n{}\n", context.trace_id(), call.parent_id, context.request_id())
    };
    let mut all = draw();
    for _ in 0..3 {
        let (mut read, mut write) = pipe().unwrap();
        match fork().unwrap() {
            Fork::Child => {
                drop(read);
                let ids: String = (0..EACH).map(|_| draw()).collect();
                write.write_all(ids.as_bytes()).unwrap();
                exit(0);
            }
            Fork::Parent(child) => {
                drop(write);
                all.extend((0..EACH).map(|_| draw()));
                read.read_to_string(&mut all).unwrap();
                waitpid(child).unwrap();
            }
        }
    }
    let ids: Vec<_> = all.split_whitespace().collect();
    assert_eq!(ids.len(), 3 * (1 + 3 * 2 * EACH));
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len());
}
