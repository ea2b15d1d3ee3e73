//! A network between the two servers that can be cut: packets vanish, no connection is ever refused or reset.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::pair::Pair;
use crate::wait::beat;

/// How long a connection to a listener that takes none is given to prove it.
const UNANSWERED: Duration = Duration::from_millis(100);
const ROOM: i32 = 128;

/// Between a port of its own and another one, both at 127.0.0.1. Dropped, it ends all its connections.
#[derive(Debug)]
pub struct Wire {
    listener: TcpListener,
    cut: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    /// Held while a connection is taken.
    taking: Arc<Mutex<()>>,
    /// Connections that nobody accepts: with them the listener's queue is full, and the kernel drops what comes.
    fillers: Mutex<Vec<TcpStream>>,
}

impl Wire {
    /// Puts a wire between the servers of a pair: `second_server` leads to it.
    pub fn between(pair: &Pair) -> Self {
        let wire = Self::to(pair.second.port());
        pair.first.sql(&format!("ALTER SERVER second_server OPTIONS (SET port '{}')", wire.port()));
        wire
    }

    /// Puts a wire before a port.
    pub fn to(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        listener.set_nonblocking(true).expect("a socket");
        let (cut, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let wire = Self {
            listener: listener.try_clone().expect("a socket"),
            cut: cut.clone(),
            ended: ended.clone(),
            taking: Arc::default(),
            fillers: Mutex::default(),
        };
        let taking = Arc::clone(&wire.taking);
        thread::spawn(move || {
            while !ended.load(Ordering::SeqCst) {
                let taken = {
                    let _taking = taking.lock().expect("the acceptor alone");
                    if cut.load(Ordering::SeqCst) { None } else { listener.accept().ok() }
                };
                match taken {
                    Some((client, _)) => connect(client, port, &cut, &ended),
                    None => beat(),
                }
            }
        });
        wire
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.address().port()
    }

    fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("an address")
    }

    /// From here on nothing gets through, and nobody is told.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
        // One that is being taken is taken first, and no other: the queue stays full.
        drop(self.taking.lock().expect("the acceptor"));
        self.listen(0);
        let mut fillers = self.fillers.lock().expect("the fillers");
        while let Ok(filler) = TcpStream::connect_timeout(&self.address(), UNANSWERED) {
            fillers.push(filler);
        }
    }

    /// Everything gets through again, also what was on its way.
    pub fn mend(&self) {
        self.listen(ROOM);
        self.fillers.lock().expect("the fillers").clear();
        self.cut.store(false, Ordering::SeqCst);
    }

    fn listen(&self, room: i32) {
        // SAFETY: listen(2) on a socket of ours that listens already changes the length of its queue.
        assert_eq!(unsafe { libc::listen(self.listener.as_raw_fd(), room) }, 0);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
    }
}

fn connect(client: TcpStream, port: u16, cut: &Arc<AtomicBool>, ended: &Arc<AtomicBool>) {
    // A server that is away refuses: then so does the wire, by closing.
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { return };
    for (from, to) in [(&client, &server), (&server, &client)] {
        let (from, to) = (from.try_clone().expect("a socket"), to.try_clone().expect("a socket"));
        from.set_nonblocking(false).expect("a socket");
        from.set_read_timeout(Some(Duration::from_millis(100))).expect("a socket");
        let _ = to.set_nodelay(true);
        let (cut, ended) = (Arc::clone(cut), Arc::clone(ended));
        thread::spawn(move || carry(from, to, &cut, &ended));
    }
}

/// Carries bytes one way until either end is closed, then closes both.
fn carry(mut from: TcpStream, mut to: TcpStream, cut: &AtomicBool, ended: &AtomicBool) {
    let mut buffer = vec![0; 64 * 1024];
    while !ended.load(Ordering::SeqCst) {
        if cut.load(Ordering::SeqCst) {
            beat();
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                while cut.load(Ordering::SeqCst) && !ended.load(Ordering::SeqCst) {
                    beat();
                }
                if to.write_all(&buffer[..n]).is_err() {
                    break;
                }
            }
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_wire_is_silent_and_a_mended_one_goes_on() {
        let server = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let wire = Wire::to(server.local_addr().expect("an address").port());
        let mut client = TcpStream::connect(wire.address()).expect("a connection");
        let (mut peer, _) = server.accept().expect("a connection");
        peer.set_read_timeout(Some(UNANSWERED)).expect("a socket");
        let mut byte = [0];
        client.write_all(b"a").expect("room");
        crate::wait::until("a byte arrives", Duration::from_secs(10), || peer.read(&mut byte).is_ok());
        wire.cut();
        client.write_all(b"b").expect("room");
        assert!(peer.read(&mut byte).is_err(), "a byte got through");
        assert!(TcpStream::connect_timeout(&wire.address(), UNANSWERED).is_err(), "a connection was accepted");
        wire.mend();
        crate::wait::until("the byte arrives", Duration::from_secs(10), || peer.read(&mut byte).is_ok());
        assert_eq!(&byte, b"b");
        TcpStream::connect_timeout(&wire.address(), Duration::from_secs(10)).expect("a connection");
    }
}
