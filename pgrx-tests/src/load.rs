//! Clients that work all the time and are asked afterwards what they noticed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use postgres::{Client, Config, Error, NoTls};

use crate::cluster::explain;
use crate::migration::is_disconnect;
use crate::wait::{LONG, SOON, Stopwatch, beat, until};

/// What the clients saw since they were last asked.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// Transactions that committed.
    pub done: u64,
    /// The first errors, as clients saw them.
    pub errors: Vec<String>,
    /// The first attempts to connect that came to nothing, as they do while a server is down.
    pub refused: Vec<String>,
    /// The longest that a transaction took, by a [`Stopwatch`].
    pub slowest: Duration,
}

impl Tally {
    /// Asserts that no client saw an error and that the clients did work.
    pub fn assert_clean(&self, when: &str) {
        assert!(self.errors.is_empty(), "clients saw errors {when}: {:#?}", self.errors);
        assert!(self.refused.is_empty(), "clients could not connect {when}: {:#?}", self.refused);
        assert!(self.done > 0, "no client got anything done {when}");
    }

    /// Asserts that, besides, no transaction took longer than `limit`.
    pub fn assert_unhurt(&self, when: &str, limit: Duration) {
        self.assert_clean(when);
        assert!(self.slowest <= limit, "a client waited {:?} {when}, more than {limit:?}", self.slowest);
    }
}

/// One transaction of a client: number of the client, number of the round, connection.
type Work = dyn Fn(usize, u64, &mut Client) -> Result<(), Error> + Send + Sync;

/// Running clients; dropping them stops them.
pub struct Load {
    stop: Arc<AtomicBool>,
    tally: Arc<Mutex<Tally>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `clients` clients that repeat `work`, each on its own connection, until they are stopped.
    pub fn start<W>(config: &Config, clients: usize, work: W) -> Self
    where
        W: Fn(usize, u64, &mut Client) -> Result<(), Error> + Send + Sync + 'static,
    {
        let load = Arc::new(work);
        let stop = Arc::new(AtomicBool::new(false));
        let tally = Arc::new(Mutex::new(Tally::default()));
        let threads = (0..clients)
            .map(|number| {
                let (config, work): (Config, Arc<Work>) = (config.clone(), load.clone());
                let (stop, tally) = (Arc::clone(&stop), Arc::clone(&tally));
                thread::spawn(move || client(number, &config, &*work, &stop, &tally))
            })
            .collect();
        let load = Self { stop, tally, threads };
        let says_something = |tally: Tally| tally.done > 0 || !tally.errors.is_empty() || !tally.refused.is_empty();
        until("the clients work", SOON, || says_something(load.peek()));
        load
    }

    /// What they saw since the last call, or the start.
    pub fn take(&self) -> Tally {
        std::mem::take(&mut self.tally.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until `count` more transactions have been done.
    pub fn until_done(&self, count: u64) {
        let goal = self.peek().done + count;
        until("the clients have done their work", LONG, || self.peek().done >= goal);
    }

    /// Lets each client end its transaction and returns what they saw since the last [`Load::take`].
    pub fn stop(mut self) -> Tally {
        self.join();
        self.take()
    }

    fn peek(&self) -> Tally {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() && !thread::panicking() {
                panic!("a client of the load panicked");
            }
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.join();
    }
}

fn client(number: usize, config: &Config, work: &Work, stop: &AtomicBool, tally: &Mutex<Tally>) {
    const ENOUGH: usize = 10;
    let mut connection: Option<Client> = None;
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        let began = Stopwatch::start();
        let result = match &mut connection {
            Some(client) if !client.is_closed() => work(number, round, client),
            lost => match config.connect(NoTls) {
                // Connecting is no work done.
                Ok(client) => {
                    *lost = Some(client);
                    continue;
                }
                Err(e) if is_disconnect(&e) => {
                    let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
                    if tally.refused.len() < ENOUGH {
                        tally.refused.push(format!("client {number}: {}", explain(&e)));
                    }
                    drop(tally);
                    beat();
                    continue;
                }
                Err(e) => Err(e),
            },
        };
        let took = began.elapsed();
        {
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(()) => {
                    tally.done += 1;
                    tally.slowest = tally.slowest.max(took);
                }
                Err(e) if tally.errors.len() < ENOUGH => tally.errors.push(format!("client {number}: {}", explain(&e))),
                Err(_) => {}
            }
        }
        round += 1;
        beat();
    }
}
