//! Serves one request in process, with a panic where the argument says. Built with
//! `panic = "abort"`, nothing catches that.

#![expect(clippy::print_stdout, reason = "it is a program")]

use std::{convert::Infallible, env, future::poll_fn, task::Poll};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty};
use tokio::runtime::Builder;
use tower::{ServiceBuilder, ServiceExt, service_fn};
use tower_tasks::{
    CatchUnwindLayer, TaskRegistry, TaskSet, TaskSetLayer, TraceIdLayer, catch_unwind::install_hook,
};

/// Panics when it is dropped.
struct Bomb(&'static str);

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("dropped {}", self.0);
    }
}

fn handle(origin: &str) -> Response<Empty<Bytes>> {
    let tasks = TaskSet::current().expect("the layer is above");
    match origin {
        "handler" => panic!("in the handler"),
        "task" => drop(tasks.spawn("task", async { panic!("in a task") })),
        "drop of a task" => {
            let mut bomb = Some(Bomb("in a task"));
            let ready = poll_fn(move |_| {
                // So that it is the future that drops it.
                let _ = bomb.as_mut();
                Poll::Ready(())
            });
            drop(tasks.spawn("task", ready));
        }
        "two of a task" => drop(tasks.spawn("task", async {
            let _bomb = Bomb("while a task unwinds");
            panic!("in a task");
        })),
        "two of the handler" => {
            let _bomb = Bomb("while the handler unwinds");
            panic!("in the handler");
        }
        _ => {}
    }
    Response::new(Empty::new())
}

fn main() {
    serve(env::args().nth(1).expect("where it is to panic"));
}

pub(crate) fn serve(origin: String) {
    install_hook();
    let tasks = TaskRegistry::new();
    let service = ServiceBuilder::new()
        .layer(TraceIdLayer::new())
        .layer(CatchUnwindLayer::new())
        .layer(TaskSetLayer::new(&tasks))
        .service(service_fn(move |_: Request<()>| {
            let origin = origin.clone();
            async move { Ok::<_, Infallible>(handle(&origin)) }
        }));
    let runtime = Builder::new_current_thread().build().expect("a runtime");
    let status = runtime.block_on(async {
        let response =
            service.oneshot(Request::new(())).await.unwrap_or_else(|never| match never {});
        let status = response.status();
        // An error: of a panic in it.
        drop(response.into_body().collect().await);
        tasks.close();
        tasks.wait().await;
        status
    });
    println!("{} and {} of tasks", status.as_u16(), tasks.snapshot().totals.panicked);
}
