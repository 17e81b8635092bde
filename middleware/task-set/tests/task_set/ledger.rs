//! The snapshot: each figure, each field, exact.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use tower_request_context::{RequestContext, TraceId};
use tower_task_set::{
    AtEnd, Counts, End, SpawnLimit, TaskRegistry, TaskSetLayer, TaskState, assert_drained,
};

use crate::support::*;

fn trace_id() -> TraceId {
    "0af7651916cd43dd8448eb211c80319c".parse().unwrap()
}

/// One task of each outcome, by its name; the runtime is gone.
fn one_of_each() -> TaskRegistry {
    let tasks = TaskRegistry::new().limit(SpawnLimit::new(5));
    let runtime = current_thread();
    runtime.block_on(async {
        tokio::time::pause();
        let layer = TaskSetLayer::new(&tasks);
        let (ended, open) = (serve(&layer), serve(&layer));
        let set = ended.set.clone();
        let completed = set.spawn("completed", async {}).unwrap();
        let panicked = set.spawn("panicked", async { panic!("counted") }).unwrap();
        let cancelled = set.spawn("cancelled", forever()).unwrap();
        let timed_out = set.task("timed out").timeout(secs(1)).spawn(forever()).unwrap();
        open.set.spawn("aborted", forever()).unwrap();
        set.spawn("refused", async {}).unwrap_err();
        outcome(completed).await;
        outcome::<()>(panicked).await;
        outcome(timed_out).await;
        ended.end(End::Completed);
        outcome(cancelled).await;
    });
    tasks
}

#[test]
fn each_outcome_is_counted_once_in_all_and_by_name() {
    let snapshot = one_of_each().snapshot();
    let totals = snapshot.totals;
    assert!(totals.is_exact());
    assert_eq!((totals.attempted, totals.refused, totals.spawned, totals.live), (6, 1, 5, 0));
    let ended =
        (totals.completed, totals.cancelled, totals.aborted, totals.timed_out, totals.panicked);
    assert_eq!(ended, (1, 1, 1, 1, 1));
    assert_eq!(snapshot.by_name.len(), 6);
    for (name, counts) in &snapshot.by_name {
        assert!(counts.is_exact());
        let own = match *name {
            "completed" => counts.completed,
            "cancelled" => counts.cancelled,
            "aborted" => counts.aborted,
            "timed out" => counts.timed_out,
            "panicked" => counts.panicked,
            _ => counts.refused,
        };
        assert_eq!((own, counts.attempted), (1, 1), "{name}");
    }
}

#[test]
fn figures_that_contradict_each_other_are_not_exact() {
    let exact = one_of_each().snapshot().totals;
    let contradictions: [fn(&mut Counts); 9] = [
        |counts| counts.attempted += 1,
        |counts| counts.refused += 1,
        |counts| counts.spawned += 1,
        |counts| counts.live += 1,
        |counts| counts.completed += 1,
        |counts| counts.cancelled += 1,
        |counts| counts.aborted += 1,
        |counts| counts.timed_out += 1,
        |counts| counts.panicked += 1,
    ];
    for contradict in contradictions {
        let mut counts = exact;
        contradict(&mut counts);
        assert!(!counts.is_exact(), "{counts:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_lists_what_lives_and_all_that_is_known_of_it() {
    let tasks = TaskRegistry::new();
    let layer = TaskSetLayer::new(&tasks).at_end(AtEnd::Drain(secs(9)));
    let context = RequestContext::new().with(trace_id());
    let request = context.sync_scope(|| serve(&layer));
    let ended = serve(&layer);
    let line = line!() + 1;
    request.set.spawn("running", forever()).unwrap();
    ended.set.spawn("drains", forever()).unwrap();
    let cancelling = ended.set.spawn("cancelling", forever()).unwrap();
    ended.set.task("kept").at_end(AtEnd::Keep).spawn(forever()).unwrap();
    settle().await;
    ended.end(End::Completed);
    cancelling.cancel();
    let mut live = tasks.snapshot().live_tasks;
    live.sort_by_key(|task| task.name);
    let shown: Vec<_> =
        live.iter().map(|task| (task.name, task.state, task.at_end, task.trace_id)).collect();
    let drain = AtEnd::Drain(secs(9));
    assert_eq!(
        shown,
        [
            ("cancelling", TaskState::Cancelling, drain, None),
            ("drains", TaskState::Draining, drain, None),
            ("kept", TaskState::Kept, AtEnd::Keep, None),
            ("running", TaskState::Running, drain, Some(trace_id())),
        ]
    );
    let running = &live[3];
    assert_eq!((running.site.file(), running.site.line()), (file!(), line));
    assert_eq!(
        running.to_string(),
        format!(
            "running (running, {} ms old, spawned at {}, trace {})",
            running.age.as_millis(),
            running.site,
            trace_id(),
        ),
    );
}

#[tokio::test]
async fn the_spawn_site_is_where_the_user_spawned() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let first = line!() + 1;
    request.set.spawn("0", forever()).unwrap();
    request.set.task("1").at_end(AtEnd::Keep).spawn(forever()).unwrap();
    tasks.spawn("2", forever()).unwrap();
    tasks.task("3").spawn(forever()).unwrap();
    let mut sites: Vec<_> = tasks
        .snapshot()
        .live_tasks
        .iter()
        .map(|task| (task.name.parse().unwrap(), task.site.line() - first))
        .collect();
    sites.sort_unstable();
    assert_eq!(sites, [(0, 0), (1, 1), (2, 2), (3, 3)]);
}

#[tokio::test(start_paused = true)]
async fn an_age_is_counted_from_the_first_await_to_16_ms() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let age = || tasks.snapshot().live_tasks[0].age;
    tokio::time::advance(secs(5)).await;
    request.set.spawn("task", forever()).unwrap();
    assert_eq!(age(), secs(5), "it has not awaited: at most as old as its set");
    settle().await;
    let tick = Duration::from_millis(16);
    assert!(age() <= tick, "{:?}", age());
    for millis in [1, 10, 100, 1_000, 3_600_000] {
        let before = age();
        tokio::time::advance(Duration::from_millis(millis)).await;
        assert_eq!(age(), before + Duration::from_millis(millis));
    }
}

#[tokio::test(start_paused = true)]
async fn tasks_that_come_at_different_times_are_of_different_ages() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    for names in [["one", "two"], ["three", "four"]] {
        for name in names {
            request.set.spawn(name, forever()).unwrap();
        }
        settle().await;
        tokio::time::advance(secs(60)).await;
    }
    let live = tasks.snapshot().live_tasks;
    let mut ages: Vec<_> = live.iter().map(|task| (task.name, task.age.as_secs())).collect();
    ages.sort_unstable();
    assert_eq!(ages, [("four", 60), ("one", 120), ("three", 60), ("two", 120)]);
}

#[tokio::test]
async fn a_name_is_one_wherever_it_is_used_and_wherever_its_text_is() {
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    let copies: [&str; 2] = [leak("task".to_owned()), leak("task".to_owned())];
    assert!(!std::ptr::eq(copies[0], copies[1]));
    for name in [copies[0], copies[1], "task"] {
        request.set.spawn(name, async {}).unwrap();
        request.set.spawn(name, forever()).unwrap();
        tasks.spawn(name, async {}).unwrap();
    }
    settle().await;
    for _ in 0..2 {
        let by_name = tasks.snapshot().by_name;
        assert_eq!(by_name.len(), 1);
        assert_eq!((by_name["task"].completed, by_name["task"].live), (6, 3));
        // And when the counts of the set have gone to the registry.
        tasks.cancel_all();
    }
    tasks.close();
    tasks.wait().await;
    assert_eq!(tasks.snapshot().by_name["task"].cancelled, 3);
}

#[tokio::test]
async fn names_beyond_1024_are_counted_as_other() {
    let names: Vec<_> = (0..1_100).map(|n| leak(format!("name {n}")).as_str()).collect();
    for in_one_set in [true, false] {
        let tasks = TaskRegistry::new();
        let layer = TaskSetLayer::new(&tasks);
        let long = serve(&layer);
        for name in &names {
            if in_one_set {
                long.set.spawn(name, async {}).unwrap();
            } else {
                let request = serve(&layer);
                request.set.spawn(name, async {}).unwrap();
                settle().await;
                request.end(End::Completed);
            }
        }
        while !tasks.is_empty() {
            tokio::task::yield_now().await;
        }
        for _ in 0..2 {
            let snapshot = tasks.snapshot();
            assert_eq!(snapshot.by_name.len(), 1_025);
            assert_eq!(snapshot.by_name["other"].completed, 76);
            let all: u64 = snapshot.by_name.values().map(|counts| counts.completed).sum();
            assert_eq!((all, snapshot.totals.completed), (1_100, 1_100));
            assert!(snapshot.by_name.values().all(Counts::is_exact));
            // The same when the sets are over.
            tasks.cancel_all();
        }
        drop(long);
        assert_eq!(tasks.snapshot().by_name["other"].completed, 76);
    }
}

#[tokio::test]
async fn a_set_of_many_names_and_places_finds_each() {
    let names: Vec<_> = (0..100).map(|n| leak(format!("name {n}")).as_str()).collect();
    let tasks = TaskRegistry::new();
    let request = serve(&TaskSetLayer::new(&tasks));
    for _ in 0..3 {
        for name in &names {
            request.set.spawn(name, forever()).unwrap();
            request.set.task(name).spawn(forever()).unwrap();
        }
    }
    let by_name = tasks.snapshot().by_name;
    assert_eq!(by_name.len(), 100);
    assert!(by_name.values().all(|counts| counts.live == 6 && counts.is_exact()));
    request.set.cancel_all();
    drop(request);
    tasks.close();
    tasks.wait().await;
    assert!(tasks.snapshot().by_name.values().all(|counts| counts.cancelled == 6));
}

#[cfg(feature = "serde")]
#[tokio::test(start_paused = true)]
async fn as_json_a_snapshot_has_exactly_these_keys() {
    use std::collections::BTreeSet;

    let tasks = TaskRegistry::new();
    let context = RequestContext::new().with(trace_id());
    let request = context.sync_scope(|| serve(&TaskSetLayer::new(&tasks)));
    let line = line!() + 1;
    request.set.spawn("running", forever()).unwrap();
    settle().await;
    tokio::time::advance(Duration::from_millis(1_500)).await;
    tasks.spawn("own", async {}).unwrap().await.unwrap();
    let json = serde_json::to_value(tasks.snapshot()).unwrap();
    let keys = |value: &serde_json::Value| {
        value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>()
    };
    let set = |keys: &[&str]| keys.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
    let counts = [
        "attempted",
        "refused",
        "spawned",
        "live",
        "completed",
        "cancelled",
        "aborted",
        "timed_out",
        "panicked",
    ];
    let mut all = set(&counts);
    all.extend(set(&["by_name", "forced_tasks", "live_tasks"]));
    assert_eq!(keys(&json), all);
    assert_eq!(
        (&json["attempted"], &json["live"], &json["completed"]),
        (&2.into(), &1.into(), &1.into())
    );
    assert_eq!(keys(&json["by_name"]), set(&["own", "running"]));
    assert_eq!(keys(&json["by_name"]["own"]), set(&counts));
    let live = &json["live_tasks"][0];
    assert_eq!(keys(live), set(&["name", "site", "age_ms", "state", "trace_id", "at_end"]));
    assert_eq!(live["name"], "running");
    assert!(live["site"].as_str().unwrap().starts_with(&format!("{}:{line}:", file!())));
    assert_eq!(live["age_ms"], 1_500);
    assert_eq!(live["state"], "running");
    assert_eq!(live["trace_id"], trace_id().to_string());
    assert_eq!(live["at_end"], "drain(30s)");
    let other = TaskRegistry::new();
    other.spawn("no ids", forever()).unwrap();
    let json = serde_json::to_value(other.snapshot()).unwrap();
    assert!(json["live_tasks"][0]["trace_id"].is_null());

    tasks.close();
    tasks.cancel_all();
    settle().await;
    let json = serde_json::to_value(tasks.snapshot()).unwrap();
    let forced = &json["forced_tasks"][0];
    assert_eq!(keys(forced), set(&["name", "site", "age_ms", "trace_id", "outcome"]));
    assert_eq!((&forced["name"], &forced["outcome"]), (&"running".into(), &"cancelled".into()));
    assert_eq!((&forced["age_ms"], &forced["trace_id"]), (&live["age_ms"], &live["trace_id"]));
}

#[tokio::test]
async fn the_leak_check_lists_what_lives() {
    let tasks = TaskRegistry::new();
    assert_drained(&tasks);
    tasks.spawn("over", async {}).unwrap().await.unwrap();
    assert_drained(&tasks);
    let request = serve(&TaskSetLayer::new(&tasks));
    request.set.spawn("leaked", forever()).unwrap();
    request.set.spawn("leaked too", forever()).unwrap();
    settle().await;
    let check = AssertUnwindSafe(|| assert_drained(&tasks));
    let checked = catch_unwind(check).unwrap_err();
    let message = checked.downcast_ref::<String>().unwrap();
    let mut lines = message.lines();
    assert_eq!(lines.next(), Some("2 tasks live:"));
    for (line, name) in lines.by_ref().zip(["leaked", "leaked too"]) {
        let start = format!("  {name} (running, ");
        assert!(line.starts_with(&start) && line.contains(file!()), "{line}");
    }
    assert_eq!(lines.next(), None);
}

#[tokio::test]
async fn two_registries_know_nothing_of_each_other() {
    let (one, other) = (TaskRegistry::new(), TaskRegistry::new());
    one.spawn("task", forever()).unwrap();
    assert_drained(&other);
    other.close();
    now(other.wait());
    assert_ledger(&one, "live 1");
    assert_ledger(&other, "");
}

#[tokio::test]
async fn a_snapshot_of_a_set_with_many_tasks_lists_each_once() {
    const MANY: usize = 5_000;
    let tasks = TaskRegistry::new();
    let served = serve(&TaskSetLayer::new(&tasks));
    let spawn = |n: usize| {
        let name = if n % 3 == 0 { "third" } else { "other" };
        served.set.spawn(name, forever()).unwrap()
    };
    let handles: Vec<_> = (0..MANY).map(spawn).collect();
    for handle in handles.into_iter().step_by(2) {
        handle.cancel();
        outcome(handle).await;
    }
    let snapshot = tasks.snapshot();
    assert!(snapshot.totals.is_exact(), "{:?}", snapshot.totals);
    assert!(snapshot.by_name.values().all(Counts::is_exact), "{:?}", snapshot.by_name);
    assert_eq!((snapshot.totals.live, snapshot.totals.cancelled), (2_500, 2_500));
    let listed = |name| snapshot.live_tasks.iter().filter(|task| task.name == name).count();
    assert_eq!(listed("third") as u64, snapshot.by_name["third"].live);
    assert_eq!(listed("other") as u64, snapshot.by_name["other"].live);
    assert_eq!(snapshot.live_tasks.len(), 2_500);
}
