//! A WebSocket whose tasks live as long as its socket, and a shutdown that says goodbye first.
//!
//! `cargo run --example websocket` prints what happens, over real sockets. It checks all that it
//! shows, and exits with 0 only if everything came out as it should.

#![expect(clippy::print_stdout, reason = "it shows what happens")]

use std::{error::Error, net::Ipv4Addr, time::Duration};

use axum::{
    Router,
    extract::{
        State,
        ws::{Message, WebSocket, WebSocketUpgrade},
    },
    response::Response,
    routing::get,
};
use futures_util::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::{WebSocketStream, client_async, tungstenite::Message as ClientMessage};
use tower_tasks::{
    AtEnd, TaskRegistry, TaskSet, TaskSetLayer,
    shutdown::{Shutdown, ShutdownWatch},
    task_set::Hold,
};

type Result<T = (), E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// The response to an upgrade is over when it has been sent, and so would its tasks be: the hold,
/// taken in the handler and kept by whoever serves the socket, keeps the set open.
async fn upgrade(
    tasks: TaskSet,
    State(watch): State<ShutdownWatch>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let hold = tasks.hold();
    upgrade.on_upgrade(|socket| serve(socket, tasks, watch, hold))
}

/// On a task that is not ours: `tasks` was moved in.
async fn serve(mut socket: WebSocket, tasks: TaskSet, watch: ShutdownWatch, hold: Hold) {
    // As long as the socket, and no longer.
    let ticker = tasks.task("ticker").at_end(AtEnd::Cancel).spawn(std::future::pending::<()>());
    println!("    the socket is open, with its ticker: {}", ticker.is_ok());
    let mut draining = std::pin::pin!(watch.draining());
    loop {
        let message = tokio::select! {
            message = socket.recv() => message,
            () = &mut draining => {
                let _ = socket.send(Message::text("goodbye")).await;
                break;
            }
        };
        let Some(Ok(Message::Text(text))) = message else { break };
        // What must be done whatever becomes of the socket: it drains after it.
        let stored = tasks.spawn("store", async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            println!("    stored: {text}");
        });
        if stored.is_err() || socket.send(Message::text("ok")).await.is_err() {
            break;
        }
    }
    drop(hold);
}

#[tokio::main]
async fn main() -> Result {
    let tasks = TaskRegistry::new();
    let shutdown = Shutdown::new(Duration::from_secs(10)).without_signals().tasks(&tasks);
    let app = Router::new()
        .route("/", get(upgrade))
        .with_state(shutdown.watch())
        .layer((shutdown.layer(), TaskSetLayer::new(&tasks)));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let connect = async || -> Result<WebSocketStream<TcpStream>> {
        let stream = TcpStream::connect(address).await?;
        Ok(client_async(format!("ws://{address}/"), stream).await?.0)
    };

    let clients = async {
        println!("A client that says something, and leaves");
        let mut first = connect().await?;
        first.send(ClientMessage::text("one")).await?;
        assert_eq!(first.next().await.ok_or("closed")??, ClientMessage::text("ok"));
        assert_eq!(tasks.snapshot().by_name["ticker"].live, 1);
        drop(first);
        while tasks.snapshot().totals.live > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let by_name = tasks.snapshot().by_name;
        println!("    the ticker was cancelled with the socket, and `store` has finished");
        assert_eq!((by_name["ticker"].cancelled, by_name["store"].completed), (1, 1));

        println!("A client that is there at the shutdown");
        let mut second = connect().await?;
        second.send(ClientMessage::text("two")).await?;
        assert_eq!(second.next().await.ok_or("closed")??, ClientMessage::text("ok"));
        shutdown.begin();
        assert_eq!(second.next().await.ok_or("closed")??, ClientMessage::text("goodbye"));
        println!("    it was told");
        Ok(())
    };
    let server = axum::serve(listener, app).with_graceful_shutdown(shutdown.signalled());
    // What goes wrong in a client ends it too.
    let clients = async {
        let told = tokio::time::timeout(Duration::from_secs(10), clients).await;
        shutdown.begin();
        told?
    };
    let (report, told): (_, Result) = tokio::join!(shutdown.run(server.into_future()), clients);
    told?;
    let (report, snapshot) = (report?, tasks.snapshot());
    println!("The shutdown\n    {:?}", snapshot.totals);
    assert_eq!((snapshot.by_name["store"].completed, snapshot.by_name["ticker"].cancelled), (2, 2));
    assert_eq!(report.exit_code(), 0, "nothing had to be forced");
    Ok(())
}
