//! What `catch-unwind` costs a poll when nothing panics, in instructions.
#![expect(clippy::print_stdout, reason = "a bench prints what it measures")]

use std::{
    convert::Infallible,
    future::Future,
    hint::black_box,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use tower::{Layer, Service, service_fn};
use tower_tasks::CatchUnwindLayer;
use tower_tasks_benches::{
    Budgets, args, grouped, has_valgrind, on_all_cores, table, this_program_under_callgrind,
    total_of,
};

fn main() {
    let args = args();
    if let Some(("poll", args)) = args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        let [way, what, polls] = args else { panic!("poll WAY WHAT POLLS") };
        return poll(way, what, polls.parse().expect("a number"));
    }
    if !has_valgrind() {
        println!("there is no valgrind here");
        return;
    }
    let mut budgets = Budgets::default();
    let row = |what: &str| {
        let [bare, ours] = ["bare", "ours"].map(|way| instructions(way, what));
        budgets.most(
            &format!("a poll of the {what}: instructions over bare"),
            ours - bare,
            60.0,
            0,
        );
        vec![what.to_owned(), grouped(bare), grouped(ours)]
    };
    let rows: Vec<_> = ["future", "body"].into_iter().map(row).collect();
    table("Instructions per poll", &["", "bare", "ours"], &rows);
    budgets.print();
}

/// By the difference of two runs.
fn instructions(way: &str, what: &str) -> f64 {
    const POLLS: [u32; 2] = [1_000, 11_000];
    let totals = on_all_cores(&POLLS, |polls| {
        let mut command = this_program_under_callgrind();
        let output = command.args(["poll", way, what, &polls.to_string()]).output();
        total_of(&output.expect("valgrind runs").stderr)
    });
    (totals[1] - totals[0]) / f64::from(POLLS[1] - POLLS[0])
}

fn poll(way: &str, what: &str, polls: u32) {
    let (waits, frames) = if what == "future" { (polls, 0) } else { (0, polls) };
    let handler = service_fn(move |_: Request<()>| Answer { waits, frames });
    if way == "bare" {
        drive(handler);
    } else {
        drive(CatchUnwindLayer::new().layer(handler));
    }
}

fn drive<S, B>(mut service: S)
where
    S: Service<Request<()>, Response = Response<B>, Error = Infallible>,
    B: Body<Data = Bytes>,
{
    let mut cx = Context::from_waker(Waker::noop());
    let mut future = pin!(service.call(Request::new(())));
    let response = loop {
        if let Poll::Ready(Ok(response)) = black_box(future.as_mut()).poll(&mut cx) {
            break response;
        }
    };
    let mut body = pin!(response.into_body());
    while let Poll::Ready(Some(_)) = black_box(body.as_mut()).poll_frame(&mut cx) {}
}

/// Waits so often, and then has so many frames.
struct Answer {
    waits: u32,
    frames: u32,
}

impl Future for Answer {
    type Output = Result<Response<Self>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        match self.waits.checked_sub(1) {
            Some(left) => {
                self.waits = black_box(left);
                Poll::Pending
            }
            None => Poll::Ready(Ok(Response::new(Self { waits: 0, frames: self.frames }))),
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let left = self.frames.checked_sub(1);
        self.frames = black_box(left.unwrap_or_default());
        Poll::Ready(left.map(|_| Ok(Frame::data(Bytes::new()))))
    }
}
