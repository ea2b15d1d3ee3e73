//! Whether a connection leads to a server, judged by their libpq options. Pure.

use std::net::IpAddr;

/// Where a foreign server is, as its options and libpq's defaults for the missing ones say.
///
/// A list of hosts is kept as libpq takes it: separated by commas, with one port or as many ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    host: Option<String>,
    hostaddr: Option<String>,
    port: Option<String>,
    dbname: Option<String>,
}

/// Where an open connection leads, as libpq says (`PQhost`, ...).
#[derive(Debug, Clone, Copy)]
pub struct Endpoint<'a> {
    /// The name by which the host was given, its address if there was no name, or a socket directory.
    pub host: &'a str,
    /// The address actually connected to; empty for a socket directory.
    pub hostaddr: &'a str,
    pub port: &'a str,
    pub dbname: &'a str,
    pub user: &'a str,
}

impl Target {
    /// `option` gives a foreign server's options, `environment` the variables of this process.
    pub fn new(option: impl Fn(&str) -> Option<String>, environment: impl Fn(&str) -> Option<String>) -> Self {
        let value =
            |name: &str, variable: &str| option(name).or_else(|| environment(variable)).filter(|v| !v.is_empty());
        Target {
            host: value("host", "PGHOST"),
            hostaddr: value("hostaddr", "PGHOSTADDR"),
            port: value("port", "PGPORT"),
            dbname: value("dbname", "PGDATABASE"),
        }
    }

    /// Whether `end` is one of the places that this server may be at; `default_port` is libpq's.
    pub fn is_reached_by(&self, end: &Endpoint, default_port: u16) -> bool {
        if self.dbname.as_deref().unwrap_or(end.user) != end.dbname {
            return false;
        }
        let (hosts, addresses, ports) = (list(&self.host), list(&self.hostaddr), list(&self.port));
        (0..hosts.len().max(addresses.len())).any(|i| {
            let port = if ports.len() == 1 { ports[0] } else { ports.get(i).copied().unwrap_or_default() };
            let host = hosts.get(i).copied().unwrap_or_default();
            let address = addresses.get(i).copied().unwrap_or_default();
            same_port(port, end.port, default_port) && same_host(host, address, end)
        })
    }
}

fn list(option: &Option<String>) -> Vec<&str> {
    option.as_deref().unwrap_or_default().split(',').map(str::trim).collect()
}

fn same_port(port: &str, actual: &str, default: u16) -> bool {
    let number = |text: &str| if text.is_empty() { Some(default) } else { text.parse().ok() };
    number(port).is_some_and(|port| Some(port) == number(actual))
}

fn same_host(host: &str, address: &str, end: &Endpoint) -> bool {
    match (host, address) {
        // The default is a socket directory, fixed when that libpq was built.
        ("", "") => end.host.starts_with(['/', '@']),
        ("", address) => same_address(address, end.host) || same_address(address, end.hostaddr),
        (host, "") => host == end.host,
        (host, address) => host == end.host && same_address(address, end.hostaddr),
    }
}

/// An address can be spelled in several ways.
fn same_address(one: &str, other: &str) -> bool {
    match (one.parse::<IpAddr>(), other.parse::<IpAddr>()) {
        (Ok(one), Ok(other)) => one == other,
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: Endpoint =
        Endpoint { host: "db.example", hostaddr: "10.0.0.7", port: "5433", dbname: "shop", user: "app" };

    fn target(options: &[(&str, &str)]) -> Target {
        let option = |name: &str| options.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        Target::new(option, |_| None)
    }

    fn reached(options: &[(&str, &str)], end: Endpoint) -> bool {
        target(options).is_reached_by(&end, 5432)
    }

    #[test]
    fn given_options_are_compared() {
        let options = [("host", "db.example"), ("port", "5433"), ("dbname", "shop")];
        assert!(reached(&options, END));
        assert!(!reached(&options, Endpoint { host: "other", ..END }));
        assert!(!reached(&options, Endpoint { port: "5434", ..END }));
        assert!(!reached(&options, Endpoint { dbname: "other", ..END }));
    }

    #[test]
    fn missing_options_are_libpqs_defaults() {
        assert!(!reached(&[("host", "db.example"), ("dbname", "shop")], END));
        assert!(reached(&[("host", "db.example"), ("dbname", "shop")], Endpoint { port: "5432", ..END }));
        assert!(reached(&[("host", "db.example"), ("port", "5433")], Endpoint { dbname: "app", ..END }));
        let socket = Endpoint { host: "/var/run/postgresql", hostaddr: "", ..END };
        assert!(reached(&[("port", "5433"), ("dbname", "shop")], socket));
        assert!(!reached(&[("port", "5433"), ("dbname", "shop")], END));
    }

    #[test]
    fn the_environment_fills_in_for_a_missing_option() {
        let environment = |name: &str| (name == "PGPORT").then(|| "5433".to_string());
        let option = |name: &str| match name {
            "host" => Some("db.example".to_string()),
            "dbname" => Some("shop".to_string()),
            _ => None,
        };
        assert!(Target::new(option, environment).is_reached_by(&END, 5432));
    }

    #[test]
    fn addresses_are_compared_by_value() {
        let end = Endpoint { host: "2001:db8::1", hostaddr: "2001:db8::1", ..END };
        let options = [("hostaddr", "2001:0db8:0:0::1"), ("port", "5433"), ("dbname", "shop")];
        assert!(reached(&options, end));
        let both = [("host", "db.example"), ("hostaddr", "10.0.0.8"), ("port", "5433"), ("dbname", "shop")];
        assert!(!reached(&both, END));
    }

    #[test]
    fn any_host_of_a_list_will_do_with_its_own_port() {
        let options = [("host", "a.example,db.example"), ("port", "5432,5433"), ("dbname", "shop")];
        assert!(reached(&options, END));
        assert!(!reached(&options, Endpoint { host: "a.example", ..END }));
        assert!(reached(&[("host", "a.example,db.example"), ("port", "5433"), ("dbname", "shop")], END));
    }
}
