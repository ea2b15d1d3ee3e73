//! Copies of a cluster that take its place: a streaming standby that is promoted, a base backup that is restored.

use crate::cluster::{Cluster, Stop};
use crate::wait::{SOON, until};

/// A copy of a cluster, on a port of its own until it takes the other's place.
#[derive(Debug)]
pub struct Replica {
    cluster: Cluster,
}

impl Replica {
    /// A base backup of `primary`, not started.
    pub fn backup(primary: &Cluster) -> Self {
        Self { cluster: Cluster::copy_of("restored", primary, false) }
    }

    /// A streaming, asynchronous standby of `primary`, started.
    pub fn standby(primary: &Cluster) -> Self {
        let standby = Self { cluster: primary.standby("standby") };
        standby.catch_up(primary);
        standby
    }

    /// Waits until it has replayed all that `primary` has written so far.
    pub fn catch_up(&self, primary: &Cluster) {
        let mark = primary.text("SELECT pg_current_wal_insert_lsn()").expect("a position");
        let query = format!("SELECT pg_last_wal_replay_lsn() >= '{mark}'");
        until("the standby has caught up", SOON, || self.cluster.text(&query).as_deref() == Some("t"));
    }

    /// Ends the stream: what the primary does from now on is lost with it.
    pub fn cut_off(&self) {
        self.cluster.sql("ALTER SYSTEM SET primary_conninfo = ''");
        self.cluster.reload();
        let query = "SELECT count(*) FROM pg_stat_wal_receiver";
        until("the stream has ended", SOON, || self.cluster.text(query).as_deref() == Some("0"));
    }

    /// Takes the place of `primary`, which has been stopped: its port, its clients. A standby is promoted.
    pub fn take_over(&mut self, primary: &Cluster) {
        assert!(primary.postmaster().is_none(), "the primary still runs");
        self.take_port(primary.port());
    }

    /// Promotes the standby, on its own port: the primary may go on.
    pub fn promote(&self) {
        self.cluster.promote();
    }

    /// The server itself.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    fn take_port(&mut self, port: u16) {
        if self.cluster.postmaster().is_some() {
            self.cluster.stop(Stop::Fast);
        }
        self.cluster.set_port(port);
        self.cluster.start();
        if self.cluster.is_standby() {
            self.cluster.promote();
        }
    }
}
