//! A connection that stays open: while it answers, no backend of its server has crashed (one crash ends all connections).

use postgres::Client;

use crate::cluster::Cluster;

/// See the module.
pub struct Witness {
    server: &'static str,
    client: Client,
}

impl Witness {
    /// Takes its seat.
    pub fn of(cluster: &Cluster) -> Self {
        Self { server: cluster.name(), client: cluster.connect() }
    }

    /// Testifies.
    ///
    /// # Panics
    /// When its connection was cut.
    pub fn testify(mut self) {
        if let Err(e) = self.client.simple_query("SELECT 1") {
            panic!("a backend of cluster {} has crashed: {e:?}", self.server);
        }
    }
}
