//! One initdb per test process; each cluster starts as a copy of its result.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::installation::{Installation, run};
use crate::process::Watchdog;

/// The database of every cluster that the tests use.
pub const DATABASE: &str = "app";

struct Template {
    base: PathBuf,
    /// Removes `base` when the process ends.
    _watchdog: Watchdog,
}

/// Copies the template's data directory to `data`.
pub fn copy_to(data: &Path) {
    static TEMPLATE: OnceLock<Template> = OnceLock::new();
    let template = TEMPLATE.get_or_init(make);
    let mut cp = Command::new("/bin/cp");
    cp.arg("-a").arg(template.base.join("data")).arg(data);
    Installation::get().as_server_user(&mut cp);
    run(cp);
}

/// An empty data directory.
pub fn initdb(data: &Path) {
    let mut initdb = Installation::get().program("initdb");
    initdb.args(["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8"]);
    initdb.arg("-D").arg(data);
    run(initdb);
}

fn make() -> Template {
    let installation = Installation::get();
    let base = tempfile::Builder::new().prefix("crossover-template.").tempdir().expect("a temporary directory").keep();
    installation.give(&base);
    let watchdog = Watchdog::over(&base);
    let data = base.join("data");
    initdb(&data);
    let mut single = installation.program("postgres");
    single.args(["--single", "-F", "-D"]).arg(&data).arg("postgres").stdin(Stdio::piped());
    single.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = single.spawn().expect("a single-user server");
    let mut stdin = child.stdin.take().expect("its standard input");
    std::io::Write::write_all(&mut stdin, format!("CREATE DATABASE {DATABASE}\n").as_bytes()).expect("to be read");
    drop(stdin);
    assert!(child.wait().expect("its end").success(), "the template's database could not be created");
    Template { base, _watchdog: watchdog }
}
