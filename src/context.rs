//! A migration as its workers hold it: its row, its pairs of tables, its two stores.

use std::time::{Duration, Instant};

use crate::catalog::{self, Migration};
use crate::cycle::appetite::Appetite;
use crate::error::{Error, Result, Side};
use crate::mapping::ident::{Ident, RelName};
use crate::mapping::model::{Mapping, NamedTable};
use crate::mapping::rule::Pair;
use crate::mapping::sql::{Objects, StoreTable};
use crate::mapping::table::Table;
use crate::owner::Warning;
use crate::state::Phase;
use crate::store::local::LocalSession;
use crate::store::postgres::{RemoteSession, Target};
use crate::store::{Isolation, Session, Store};

pub struct Context {
    pub migration: Migration,
    pub pairs: Vec<Pair>,
    /// The first tables by oid, and their present names.
    pub first_tables: Vec<(u32, RelName)>,
    pub first: Store<LocalSession>,
    pub second: Option<Store<RemoteSession>>,
    /// Second tables as their own server describes them; read at the first connection.
    remote: Vec<Table>,
    /// Second tables that a lock attempt waited for in vain, the last one first.
    pub stubborn_second: Vec<usize>,
    /// Set-up has begun to install: its undoing has something to remove.
    pub installing: bool,
    /// For whoever asked for the start.
    pub warnings: Vec<Warning>,
    /// Nothing that has been replicated was lost before this connection was made ([`crate::divergence`]).
    pub verified: bool,
    /// How much a cycle in both directions takes at a time.
    pub appetite: Appetite,
    /// When the stores' constraints were read; None: they have to be.
    constraints_at: Option<Instant>,
}

pub type FirstStore = Store<LocalSession>;
pub type SecondStore = Store<RemoteSession>;

/// How long a constraint that was added goes unnoticed.
const CONSTRAINTS_EVERY: Duration = Duration::from_secs(10);
/// How long connecting to the second server may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

impl Context {
    /// Reads the migration; in transactions of its own. Connects to nothing.
    pub fn load(session: LocalSession, id: i32) -> Result<Option<Context>> {
        let mut session = session;
        session.begin(Isolation::ReadCommitted, &[])?;
        let migration = Migration::load(&mut session, id);
        session.rollback();
        let Some(migration) = migration? else { return Ok(None) };
        let objects = Objects::new(Side::First, &migration.tag);
        let first = Store::new(session, objects);
        Ok(Some(Context {
            migration,
            pairs: Vec::new(),
            first_tables: Vec::new(),
            first,
            second: None,
            remote: Vec::new(),
            stubborn_second: Vec::new(),
            installing: false,
            warnings: Vec::new(),
            verified: false,
            appetite: Appetite::default(),
            constraints_at: None,
        }))
    }

    /// Reads state, phase and the like anew. False when the migration is gone.
    pub fn reload(&mut self) -> Result<bool> {
        self.first.session.begin(Isolation::ReadCommitted, &[])?;
        let migration = Migration::load(&mut self.first.session, self.migration.id);
        self.first.session.rollback();
        match migration? {
            Some(migration) => {
                // Set-up knows the server before it is written down.
                let server_id = self.migration.server_id;
                self.migration = migration;
                if self.migration.server_id == 0 {
                    self.migration.server_id = server_id;
                }
                Ok(true)
            }
            None => Ok(false),
        }
    }

    pub fn named_tables(&self) -> Result<Vec<NamedTable>> {
        Mapping::parse(&self.migration.mapping)
            .map_err(|problems| Error::Mapping { name: self.migration.name.clone(), problems })
    }

    /// Describes the tables and compiles the rules, once capture is installed. Needs no second server.
    pub fn load_tables(&mut self) -> Result<()> {
        let named = self.named_tables()?;
        let session = &mut self.first.session;
        session.begin(Isolation::ReadCommitted, &[])?;
        let loaded = load_pairs(session, &self.migration, &named);
        session.rollback();
        (self.pairs, self.first_tables) = loaded?;
        self.refresh_first();
        Ok(())
    }

    pub fn set_tables(&mut self, pairs: Vec<Pair>, first_tables: Vec<(u32, RelName)>, remote: Vec<Table>) {
        (self.pairs, self.first_tables, self.remote) = (pairs, first_tables, remote);
        self.refresh_first();
        self.refresh_second();
    }

    fn refresh_first(&mut self) {
        let objects = &self.first.objects;
        self.first.tables =
            self.pairs.iter().zip(&self.first_tables).map(|(p, (_, rel))| StoreTable::first(p, objects, rel)).collect();
    }

    fn refresh_second(&mut self) {
        if let Some(second) = &mut self.second {
            second.tables = self.pairs.iter().zip(&self.remote).map(|(p, t)| StoreTable::second(p, t)).collect();
        }
    }

    /// The present names of the first tables, after a takeover or its undoing.
    pub fn rename_first(&mut self, names: Vec<RelName>) {
        for ((_, rel), name) in self.first_tables.iter_mut().zip(names) {
            *rel = name;
        }
        self.refresh_first();
    }

    pub fn target(&mut self) -> Result<Target> {
        let (server, owner) = (self.migration.server_id, self.migration.owner);
        let session = &mut self.first.session;
        session.begin(Isolation::ReadCommitted, &[])?;
        let options = catalog::connection_options(session, server, owner);
        session.rollback();
        let options = options?;
        // Which only a superuser can say, in the user mapping.
        let excused = options.iter().any(|(name, value)| name == "password_required" && is_false(value));
        Ok(Target::new(options, !self.migration.owner_is_superuser && !excused))
    }

    /// Connects to the second server if there is no connection, or a broken one.
    pub fn connect(&mut self) -> Result<()> {
        if self.second.as_ref().is_some_and(|s| !s.session.is_broken()) {
            return Ok(());
        }
        self.second = None;
        let target = self.target()?;
        let session = RemoteSession::connect(&target, Some(Instant::now() + CONNECT_PATIENCE))?;
        let objects = Objects::new(Side::Second, &self.migration.tag);
        let mut second = Store::new(session, objects);
        if self.remote.is_empty() && !self.pairs.is_empty() {
            let mut remote = Vec::new();
            for pair in &self.pairs {
                let mut found = catalog::describe(&mut second.session, &pair.second.remote)?.ok_or_else(|| {
                    Error::internal(format!("table {} is gone on the second server", pair.second.remote))
                })?;
                found.table.key = remote_key(pair);
                remote.push(found.table);
            }
            self.remote = remote;
        }
        self.second = Some(second);
        self.verified = false;
        self.constraints_at = None;
        self.refresh_second();
        Ok(())
    }

    /// Reads the constraints of both stores, unless that was done a moment ago. In transactions of its own.
    pub fn refresh_constraints(&mut self) -> Result<()> {
        if self.constraints_at.is_some_and(|at| at.elapsed() < CONSTRAINTS_EVERY) {
            return Ok(());
        }
        let Context { pairs, first_tables, first, second, remote, .. } = self;
        let second = second.as_mut().ok_or_else(|| Error::internal("not connected"))?;
        let tables: Vec<(u32, Vec<Ident>)> = pairs
            .iter()
            .zip(first_tables.iter())
            .map(|(p, (oid, _))| (*oid, p.key.iter().map(|(a, _)| a.clone()).collect()))
            .collect();
        first.session.begin(Isolation::ReadCommitted, &[])?;
        let found = catalog::constraints(&mut first.session, &tables);
        first.session.rollback();
        first.constraints = found?;
        let tables: Vec<(u32, Vec<Ident>)> = remote.iter().map(|t| (t.oid, t.key.clone())).collect();
        second.constraints = catalog::constraints(&mut second.session, &tables)?;
        first.constraints.mark_mirrored(&second.constraints, |table, column| pairs[table].second_column(column));
        second.constraints.mark_mirrored(&first.constraints, |table, column| pairs[table].first_column(column));
        self.constraints_at = Some(Instant::now());
        Ok(())
    }

    /// Both stores, once connected.
    pub fn stores(&mut self) -> Result<(&mut FirstStore, &mut SecondStore)> {
        let second = self.second.as_mut().ok_or_else(|| Error::internal("not connected"))?;
        Ok((&mut self.first, second))
    }

    /// Does `work`, which may take the second server longer than usual. What comes after it may not: a worker that waits for a server that
    /// has gone tells nobody.
    pub fn patiently<T>(&mut self, patience: Duration, work: impl FnOnce(&mut Context) -> Result<T>) -> Result<T> {
        let before = self.stores()?.1.session.set_patience(patience);
        let result = work(self);
        if let Some(second) = &mut self.second {
            second.session.set_patience(before);
        }
        result
    }

    /// In a transaction of its own.
    pub fn set_phase(&mut self, phase: Phase) -> Result<()> {
        let before = self.migration.phase;
        self.migration.phase = phase;
        let Context { migration, first, .. } = self;
        first.session.begin(Isolation::ReadCommitted, &[])?;
        let result = migration.store(&mut first.session).and_then(|()| first.session.commit());
        if result.is_err() {
            first.session.rollback();
            migration.phase = before;
        }
        result
    }

    /// Ends whatever transactions an error has left open.
    pub fn rollback_all(&mut self) {
        self.constraints_at = None;
        self.first.session.rollback();
        if let Some(second) = &mut self.second {
            second.session.rollback();
            second.session.set_deadline(None);
            if second.session.is_broken() {
                self.second = None;
            }
        }
    }
}

/// As PostgreSQL reads a boolean: any unique prefix counts.
fn is_false(text: &str) -> bool {
    let text = text.trim().to_ascii_lowercase();
    matches!(text.as_str(), "0" | "of" | "off")
        || !text.is_empty() && ("false".starts_with(&text) || "no".starts_with(&text))
}

/// The key of a pair by the columns' names on the second server.
pub fn remote_key(pair: &Pair) -> Vec<crate::mapping::ident::Ident> {
    pair.key.iter().filter_map(|(_, b)| pair.second.column(b)).map(|c| c.remote_name.clone()).collect()
}

type Loaded = (Vec<Pair>, Vec<(u32, RelName)>);

fn load_pairs(session: &mut LocalSession, migration: &Migration, named: &[NamedTable]) -> Result<Loaded> {
    let rows = session.admin_query(
        "SELECT first_table::int8 FROM crossover.migrated_table WHERE migration_id = $1::text::int ORDER BY index",
        &[Some(&migration.id.to_string())],
    )?;
    let (mut pairs, mut tables) = (Vec::new(), Vec::new());
    for (i, (named, row)) in named.iter().zip(rows).enumerate() {
        let oid: u32 = crate::store::parse(row[0].as_deref().unwrap_or("0"))?;
        let gone = |rel: &RelName| Error::TableIsGone {
            name: migration.name.clone(),
            table: rel.to_string(),
            taken_over: migration.taken_over,
        };
        let first = catalog::describe_oid(session, oid)?.ok_or_else(|| gone(&named.first))?;
        let second = catalog::describe(session, &named.second)?.ok_or_else(|| gone(&named.second))?;
        tables.push((oid, first.table.rel.clone()));
        let mut first = first.table;
        // Rules speak of the table by the name that it had, whatever it is called now.
        first.rel = named.first.clone();
        if let Some(key) = &named.key {
            first.key = key.iter().map(crate::mapping::ident::Ident::new).collect();
        }
        pairs.push(
            Pair::compile(i, named, first, second.table)
                .map_err(|problems| Error::Misfit { name: migration.name.clone(), problems })?,
        );
    }
    Ok((pairs, tables))
}
