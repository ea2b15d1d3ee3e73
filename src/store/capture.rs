//! Capture and fence of a store's tables: put there, looked at, renewed when a table's partitions or subscriptions change, removed.
//!
//! A look is part of the transaction that replicates: a partition that its snapshot does not know cannot have rows in it that
//! matter to it. What a look finds changed is mended in a transaction of its own, before anything that came after is replicated.

use super::{Isolation, Session, Store};
use crate::error::{Error, Result};
use crate::mapping::capture::{self, Ours, enable};
use crate::mapping::text::array_literal;
use crate::settings;

/// A table of a tree, or a table by itself.
struct Member {
    source: usize,
    /// As the catalogs quote it.
    name: String,
    is_root: bool,
    by_row: bool,
    has_rows: bool,
    maybe_truncated: bool,
    known: bool,
    changed: bool,
    complete: bool,
    fenced: bool,
}

impl<S: Session> Store<S> {
    fn names(&self) -> String {
        array_literal(self.tables.iter().map(|t| t.rel.to_string()))
    }

    fn members(&mut self) -> Result<Vec<Member>> {
        let sql = capture::members(&self.objects);
        let names = self.names();
        let rows = self.session.admin_query(&sql, &[Some(&names)])?;
        rows.into_iter()
            .map(|row| {
                let flag = |i: usize| row[i].as_deref() == Some("t");
                Ok(Member {
                    source: super::parse(row[0].as_deref().unwrap_or(""))?,
                    name: row[1].clone().unwrap_or_default(),
                    is_root: flag(2),
                    by_row: flag(3),
                    has_rows: flag(4),
                    maybe_truncated: flag(5),
                    known: flag(6),
                    changed: flag(7),
                    complete: flag(8),
                    fenced: flag(9),
                })
            })
            .collect()
    }

    /// Installs capture and the fence (off) on every table, in the caller's transaction, which has locked them.
    pub fn install_capture(&mut self) -> Result<()> {
        for m in self.members()? {
            let table = &self.tables[m.source];
            let mut sql = String::new();
            if m.is_root {
                sql += &table.create_capture(&self.objects, m.by_row);
            }
            if m.by_row {
                sql += &table.member_triggers(&self.objects, &m.name, false);
            }
            self.session.admin_batch(&sql)?;
        }
        self.remember()
    }

    fn remember(&mut self) -> Result<()> {
        let (sql, names) = (capture::remember(&self.objects), self.names());
        self.session.admin_execute(&sql, &[Some(&names)]).map(drop)
    }

    /// # Errors
    /// `Error::CaptureChanged` where [`Store::renew_capture`] has something to do. `Error::NotCaptured`: a trigger that is disabled lets
    /// changes slip, and replication stops rather than lose them silently; once it is enabled again, the whole table is compared.
    pub fn check_capture(&mut self) -> Result<()> {
        let found = self.look_at_capture()?;
        let Some((what, _)) = found.first() else { return Ok(()) };
        if what == "changed" {
            return Err(Error::CaptureChanged);
        }
        let list =
            found.iter().filter(|(w, _)| w == what).map(|(_, name)| name.as_str()).collect::<Vec<_>>().join(", ");
        let side = self.side();
        let detail = match what.as_str() {
            "inherited" => {
                format!(
                    "Tables inherit from a table of the {side} store, and changes of their rows are not captured: {list}."
                )
            }
            "replaced" => format!("Tables of the {side} store were dropped and made anew: {list}."),
            _ => format!("Capture is not enabled on the {side} store: {list}."),
        };
        Err(Error::NotCaptured { name: String::new(), detail })
    }

    /// As [`Store::check_capture`] for a store whose changes do not count at present: only what can be mended is an error.
    pub fn check_idle_capture(&mut self) -> Result<()> {
        match self.look_at_capture()?.first() {
            Some((what, _)) if what == "changed" => Err(Error::CaptureChanged),
            _ => Ok(()),
        }
    }

    fn look_at_capture(&mut self) -> Result<Vec<(String, String)>> {
        let (sql, names) = (capture::look(&self.objects), self.names());
        let rows = self.session.admin_query(&sql, &[Some(&names)])?;
        Ok(rows
            .into_iter()
            .filter_map(|r| {
                let mut r = r.into_iter().skip(1);
                Some((r.next()??, r.next()??))
            })
            .collect())
    }

    /// Brings capture up to date with partitions that came or went, with subscriptions, with triggers that were dropped or off for a
    /// while, or enabled with all others (the fence is to be up if `fenced`), and with rows that DDL has rewritten; in a transaction of its own. Each root is locked against ATTACH and DETACH (SHARE UPDATE EXCLUSIVE), what gets triggers against writers. Where the store's changes
    /// count (`logged`), what happened unseen is logged: the rows that came, or the scope that overlaps every scope.
    ///
    /// # Errors
    /// Contention, after which it is tried again; or that the role may not.
    pub fn renew_capture(&mut self, logged: bool, fenced: bool) -> Result<()> {
        self.session.begin(Isolation::ReadCommitted, &[])?;
        let result = self.renew(logged, fenced).and_then(|()| self.session.commit());
        if result.is_err() {
            self.session.rollback();
        }
        result
    }

    fn renew(&mut self, logged: bool, fenced: bool) -> Result<()> {
        self.session.become_replica()?;
        self.session.set_lock_timeout(settings::lock_attempt())?;
        for m in self.members()?.iter().filter(|m| m.is_root) {
            self.session.admin_batch(&format!("LOCK TABLE ONLY {} IN SHARE UPDATE EXCLUSIVE MODE", m.name))?;
        }
        let names = self.names();
        for row in self.session.admin_query(&capture::half_enabled(&self.objects), &[Some(&names)])? {
            let [Some(rel), Some(trigger), is_fence] = &row[..] else { continue };
            let on = fenced || is_fence.as_deref() != Some("t");
            self.session.admin_batch(&format!("ALTER TABLE {rel} {} TRIGGER {trigger}", enable(on)))?;
        }
        let gone = self.session.admin_query(&capture::gone(&self.objects), &[Some(&names)])?;
        let mut whole: Vec<usize> =
            gone.iter().map(|r| super::parse(r[0].as_deref().unwrap_or(""))).collect::<Result<_>>()?;
        let mut log = String::new();
        for m in self.members()? {
            if m.is_root && !m.complete {
                self.rebuild(&m)?;
            } else if !m.complete {
                let sql = self.tables[m.source].member_triggers(&self.objects, &m.name, m.fenced);
                self.session.admin_batch(&sql)?;
            }
            // A table that was truncated or rewritten has another file than at first: it may have held rows that were replicated.
            if m.changed || !m.known && m.has_rows && m.maybe_truncated {
                whole.push(m.source);
            } else if !m.known && m.has_rows {
                log += &format!("{};\n", self.tables[m.source].log_member(&self.objects, &m.name));
            }
        }
        let left = self.session.admin_query(&capture::left_behind(&self.objects), &[Some(&names)])?;
        for row in &left {
            let [Some(rel), Some(trigger)] = &row[..] else { continue };
            self.session.admin_batch(&format!("DROP TRIGGER {trigger} ON {rel}"))?;
        }
        whole.sort_unstable();
        whole.dedup();
        for source in whole {
            log += &format!("{};\n", self.tables[source].log_whole(&self.objects));
        }
        if logged && !log.is_empty() {
            self.session.admin_batch(&log)?;
        }
        self.session.admin_execute(&format!("DELETE FROM {}", self.objects.member()), &[])?;
        self.remember()
    }

    /// Makes the triggers of a root anew: some are missing, or they are to be per row from now on.
    fn rebuild(&mut self, root: &Member) -> Result<()> {
        let names = self.names();
        let ours = self.session.admin_query(&capture::triggers(&self.objects, Ours::All), &[Some(&names)])?;
        let mut sql = String::new();
        for row in ours.iter().filter(|r| r[0].as_deref() == Some(&root.name)) {
            sql += &format!("DROP TRIGGER {} ON {};\n", row[1].as_deref().unwrap_or(""), root.name);
        }
        let (table, mode) = (&self.tables[root.source], enable(root.fenced));
        sql += &table.create_capture(&self.objects, root.by_row);
        if root.by_row {
            sql += &table.member_triggers(&self.objects, &root.name, root.fenced);
            sql += &format!("ALTER TABLE {} {mode} TRIGGER crossover_fence_row", root.name);
        } else {
            sql += &format!("ALTER TABLE {} {mode} TRIGGER crossover_fence", root.name);
        }
        self.session.admin_batch(&sql)
    }

    /// The triggers that this migration has here, by table, as statements that drop them.
    pub fn drop_triggers(&mut self) -> Result<Vec<String>> {
        let names = self.names();
        let rows = self.session.admin_query(&capture::triggers(&self.objects, Ours::All), &[Some(&names)])?;
        let mut drops: Vec<(String, String)> = Vec::new();
        for row in rows {
            let [Some(rel), Some(trigger)] = &row[..] else { continue };
            let sql = format!("DROP TRIGGER {trigger} ON {rel};\n");
            match drops.last_mut().filter(|(last, _)| last == rel) {
                Some((_, drop)) => *drop += &sql,
                None => drops.push((rel.clone(), sql)),
            }
        }
        Ok(drops.into_iter().map(|(_, sql)| sql).collect())
    }

    /// Is the fence up, table by table?
    pub fn fences(&mut self) -> Result<Vec<bool>> {
        Ok(self.members()?.iter().filter(|m| m.is_root).map(|m| m.fenced).collect())
    }

    /// Turns the fence of every table on or off, under SHARE ROW EXCLUSIVE.
    pub fn set_fence(&mut self, on: bool) -> Result<()> {
        self.enable_triggers(Ours::Fence, on)
    }

    /// Turns capture off, or on again, as if it had just been installed: for tables as they are then. In the caller's transaction, which
    /// has locked them against writers.
    pub fn enable_capture(&mut self, on: bool) -> Result<()> {
        self.enable_triggers(Ours::Capture, on)?;
        if on { self.renew(false, false) } else { Ok(()) }
    }

    fn enable_triggers(&mut self, which: Ours, on: bool) -> Result<()> {
        let names = self.names();
        let rows = self.session.admin_query(&capture::triggers(&self.objects, which), &[Some(&names)])?;
        for row in rows {
            let [Some(rel), Some(trigger)] = &row[..] else { continue };
            self.session.admin_batch(&format!("ALTER TABLE {rel} {} TRIGGER {trigger}", enable(on)))?;
        }
        Ok(())
    }
}
