//! pg_crossover: moves live tables into a foreign-data-wrapped store of another structure, and back.
//!
//! Imports point downwards: api and workers, then switch and set-up, then cycle and copy, then stores, then mapping and catalog.

use pgrx::prelude::*;

mod api;
mod caller;
mod catalog;
mod check;
mod conflict;
mod context;
mod copy;
mod cycle;
mod divergence;
mod drop_database;
mod ending;
mod error;
mod fault;
#[cfg_attr(test, allow(dead_code))]
mod isolation;
mod lock;
mod mapping;
mod owner;
mod parked;
mod peer;
mod processes;
mod reconcile;
mod resolve;
mod resync;
mod route;
mod settings;
mod setup;
mod state;
mod statistics;
mod store;
mod switch;
mod transition;
mod version;
mod views;
mod worker;

::pgrx::pg_module_magic!(name, version);

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    settings::register();
    // SAFETY: flags that PostgreSQL sets before it loads libraries.
    let (preloading, upgrading) =
        unsafe { (pg_sys::process_shared_preload_libraries_in_progress, pg_sys::IsBinaryUpgrade) };
    if !preloading {
        return;
    }
    isolation::init();
    route::init();
    drop_database::init();
    if !upgrading {
        worker::register_launcher();
    }
}

/// Required by `cargo pgrx test`.
#[cfg(test)]
pub mod pg_test {
    pub fn setup(_options: Vec<&str>) {}

    #[must_use]
    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec!["shared_preload_libraries = 'pg_crossover'", "max_worker_processes = 16"]
    }
}
