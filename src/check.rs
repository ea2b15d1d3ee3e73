//! Everything that is checked before a migration touches anything; all that is wrong is reported at once.
//!
//! Reads both catalogs in the caller's transactions. Expressions are tried by parsing them only: nothing runs.

use std::collections::BTreeSet;

use crate::catalog::{self, Member, Migration, Relation};
use crate::error::{Error, Problem, Result};
use crate::mapping::form::pointer_token;
use crate::mapping::ident::{Ident, RelName};
use crate::mapping::model::{NamedTable, Takeover, Target};
use crate::mapping::rule::Pair;
use crate::mapping::table::{Table, keys_agree};
use crate::mapping::text::array_literal;
use crate::store::local::LocalSession;
use crate::store::{Session, parse};

/// What the check of the first server found: the pairs, and the foreign server that they all lie on.
#[derive(Default)]
pub struct Checked {
    pub pairs: Vec<Pair>,
    pub first_tables: Vec<(u32, RelName)>,
    pub server_id: u32,
}

/// Suffix of the first table's name once the managed view has taken it over.
pub const FIRST_SUFFIX: &str = "__first";
/// Suffix of the view over which UPDATE and DELETE run when the managed view is not auto-updatable.
pub const WRITE_SUFFIX: &str = "__write";

/// Checks the mapping against the first server.
pub fn first_server(
    session: &mut LocalSession,
    migration: &Migration,
    named: &[NamedTable],
) -> Result<(Checked, Vec<Problem>)> {
    let mut problems = Vec::new();
    let encoding = session
        .query("SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = current_database()", &[])?;
    if encoding[0][0].as_deref() != Some("UTF8") {
        problems
            .push(Problem::new("database", "the encoding is not UTF8").hint("Other encodings are not supported yet."));
    }
    let mut checked = Checked::default();
    let mut servers = BTreeSet::new();
    let first_oids = oids(session, named.iter().map(|n| &n.first))?;
    for (i, named) in named.iter().enumerate() {
        let first = catalog::describe(session, &named.first)?;
        let second = catalog::describe(session, &named.second)?;
        match &first {
            None => {
                problems.push(Problem::new(&named.first, "the table does not exist").hint(
                    "Names are folded to lower case unless they are in double quotes, as in SQL: public.\"Order\".",
                ))
            }
            Some(first) => first_table(session, migration, named, first, &first_oids, &mut problems)?,
        }
        match &second {
            None => problems.push(
                Problem::new(&named.second, "the foreign table does not exist")
                    .hint("Create it with CREATE FOREIGN TABLE or IMPORT FOREIGN SCHEMA."),
            ),
            Some(second) if second.kind != 'f' => {
                problems.push(
                    Problem::new(&named.second, "is not a foreign table").hint(
                        "Create one that stands for the table on the second server, with CREATE FOREIGN TABLE or IMPORT FOREIGN SCHEMA.",
                    ),
                );
            }
            Some(second) if second.server_wrapper.as_deref() != Some("postgres_fdw") => problems.push(
                Problem::new(&named.second, "is not behind postgres_fdw").hint("Other wrappers are not supported yet."),
            ),
            Some(second) => {
                owner(&named.second, second, migration, &mut problems);
                servers.extend(second.server);
            }
        }
        if let Some(view) = &named.second_view {
            second_view(session, view, &mut problems)?;
        }
        let (Some(first), Some(second)) = (first, second) else { continue };
        if first.owner != migration.owner
            && let Some(server) = second.server
        {
            user_mapping(session, server, first.owner, Some(&named.first), &mut problems)?;
        }
        let mut table = first.table.clone();
        key(session, named, first.kind, &mut table, &mut problems)?;
        match Pair::compile(i, named, table, second.table) {
            Ok(pair) => {
                if matches!(first.kind, 'r' | 'p') {
                    expressions(session, named, &pair, &mut problems)?;
                }
                checked.first_tables.push((first.table.oid, first.table.rel.clone()));
                checked.pairs.push(pair);
            }
            Err(found) => problems.extend(found),
        }
    }
    let is_one = servers.len() == 1;
    if servers.len() > 1 {
        problems.push(
            Problem::new("mapping", "the foreign tables lie on more than one server")
                .hint("One migration leads to one server: start one for each."),
        );
    }
    for server in &servers {
        user_mapping(session, *server, migration.owner, None, &mut problems)?;
    }
    // With more than one, there is none to look at.
    checked.server_id = servers.into_iter().next().filter(|_| is_one).unwrap_or(0);
    Ok((checked, problems))
}

/// The name of the second shape's view must be free, in a schema that there is.
fn second_view(session: &mut LocalSession, view: &RelName, problems: &mut Vec<Problem>) -> Result<()> {
    let found = session.query(
        "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1::text::name), to_regclass($2::text) IS NOT NULL",
        &[Some(view.schema.as_str()), Some(&view.to_string())],
    )?;
    if found[0][0].as_deref() != Some("t") {
        problems.push(Problem::new(view, "its schema does not exist").hint(format!("CREATE SCHEMA {};", view.schema)));
    }
    if found[0][1].as_deref() == Some("t") {
        problems.push(Problem::new(view, "already exists").hint(
            "The migration makes the view of the second shape itself: choose a name that is free, or drop what has it.",
        ));
    }
    Ok(())
}

/// `role` must have a way to the foreign server; `table`: as the owner of it, for the managed view.
fn user_mapping(
    session: &mut LocalSession,
    server: u32,
    role: u32,
    table: Option<&RelName>,
    problems: &mut Vec<Problem>,
) -> Result<()> {
    let found = session.admin_query(
        "SELECT EXISTS (SELECT FROM pg_user_mapping WHERE umserver = s.oid AND umuser IN (0, r.oid)), s.srvname::text, r.rolname::text \
         FROM pg_foreign_server s, pg_roles r WHERE s.oid = $1::text::oid AND r.oid = $2::text::oid",
        &[Some(&server.to_string()), Some(&role.to_string())],
    )?;
    let Some([Some(mapped), Some(server), Some(role)]) = found.first().map(Vec::as_slice) else { return Ok(()) };
    if mapped == "t" {
        return Ok(());
    }
    let (server, role) = (Ident::new(server), Ident::new(role));
    let problem = match table {
        Some(table) => Problem::new(
            table,
            format!("its owner {role}, as whom the managed view will be read, has no user mapping for server {server}"),
        ),
        None => Problem::new(format!("server {server}"), format!("role {role} has no user mapping for it")),
    };
    problems.push(
        problem.hint(format!("CREATE USER MAPPING FOR {role} SERVER {server} OPTIONS (user '...', password '...');")),
    );
    Ok(())
}

fn oids<'a>(session: &mut LocalSession, names: impl Iterator<Item = &'a RelName>) -> Result<Vec<u32>> {
    let names = array_literal(names.map(|n| n.to_string()));
    let rows = session.query("SELECT to_regclass(n)::oid::int8 FROM unnest($1::text[]) AS n", &[Some(&names)])?;
    rows.iter().filter_map(|r| r[0].as_deref()).map(parse).collect()
}

fn owner(name: &RelName, relation: &Relation, migration: &Migration, problems: &mut Vec<Problem>) {
    // A superuser may migrate what belongs to others; it stays theirs.
    if relation.owner != migration.owner && !migration.owner_is_superuser {
        problems.push(
            Problem::new(name, format!("is not owned by {}", migration.owner_name))
                .hint("All tables of a migration belong to the role that starts it: SET ROLE to their owner."),
        );
    }
}

fn first_table(
    session: &mut LocalSession,
    migration: &Migration,
    named: &NamedTable,
    first: &Relation,
    all: &[u32],
    problems: &mut Vec<Problem>,
) -> Result<()> {
    let mut problem = |message: &str, hint: &str| {
        let p = Problem::new(&named.first, message);
        problems.push(if hint.is_empty() { p } else { p.hint(hint) });
    };
    if let Some((message, hint)) = kind_problem(first, &named.first) {
        problem(message, hint);
        return Ok(());
    }
    for (message, hint) in tree_problems(first) {
        problem(message, hint);
    }
    let tree = catalog::tree(session, first.table.oid)?;
    for (message, hint) in tree.iter().skip(1).filter_map(member_problem) {
        problem(&message, hint);
    }
    match first.persistence {
        'u' => problem(
            "is UNLOGGED: its rows would not survive a crash",
            &format!("ALTER TABLE {} SET LOGGED;", named.first),
        ),
        't' => problem("is a temporary table", "Its rows are gone when its session ends: create an ordinary table."),
        _ => {}
    }
    if first.row_security {
        problem("has row security", "The managed view could not carry its policies. Such tables are not supported.");
    }
    let oid = first.table.oid.to_string();
    let claimed = session.admin_query(
        "SELECT m.name FROM crossover.migrated_table t JOIN crossover.migration m ON m.id = t.migration_id \
         WHERE t.first_table = $1::text::oid AND m.state NOT IN ('finished', 'cancelled') AND m.id <> $2::text::int",
        &[Some(&oid), Some(&migration.id.to_string())],
    )?;
    if let Some(name) = claimed.first().and_then(|r| r[0].as_deref()) {
        problem(
            &format!("belongs to migration \"{name}\""),
            "A table is in one migration at a time; see migration_status.",
        );
    }
    let tree = array_literal(tree.iter().map(|m| m.oid.to_string()));
    let dependents = session.query(
        "SELECT DISTINCT r.ev_class::regclass::text FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid \
         JOIN pg_class v ON v.oid = r.ev_class AND v.relnamespace <> to_regnamespace('crossover') \
         WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY ($1::text::oid[]) AND r.ev_class <> d.refobjid",
        &[Some(&tree)],
    )?;
    for row in dependents {
        problem(
            &format!("view {} depends on it", row[0].as_deref().unwrap_or("?")),
            "Dependent views are not supported yet.",
        );
    }
    if !migration.options.foreign_keys {
        let keys = session.query(
            "SELECT conname::text, conrelid::regclass::text FROM pg_constraint WHERE contype = 'f' AND ( \
             (confrelid = ANY ($1::text::oid[]) AND NOT conrelid = ANY ($2::text::oid[])) OR (conrelid = ANY ($1::text::oid[]) AND NOT confrelid = ANY ($2::text::oid[]))) \
             AND conparentid = 0",
            &[Some(&tree), Some(&array_literal(all.iter().map(u32::to_string)))],
        )?;
        for row in keys {
            problem(
                &format!(
                    "foreign key \"{}\" on {} leaves the migration",
                    row[0].as_deref().unwrap_or("?"),
                    row[1].as_deref().unwrap_or("?")
                ),
                "Migrate both tables together, or accept it with the option {\"foreign_keys\": true}.",
            );
        }
    }
    owner(&named.first, first, migration, problems);
    for suffix in [FIRST_SUFFIX, WRITE_SUFFIX] {
        let reserved = named.first.with_suffix(suffix);
        if catalog::describe(session, &reserved)?.is_some() {
            problems.push(
                Problem::new(&named.first, format!("the name {reserved}, which the takeover needs, is taken"))
                    .hint(format!("ALTER TABLE {reserved} RENAME TO ...;")),
            );
        }
    }
    Ok(())
}

/// What the first table is instead of a table.
fn kind_problem(first: &Relation, name: &RelName) -> Option<(&'static str, &'static str)> {
    let hint = "The first store is ordinary tables of this database, and partitioned ones.";
    Some(match first.kind {
        _ if matches!(name.schema.as_str(), "pg_catalog" | "information_schema" | "crossover") => {
            ("belongs to PostgreSQL or to the extension", hint)
        }
        'r' | 'p' => return None,
        'v' => ("is a view", "Name the table that it reads."),
        'm' => ("is a materialized view", "Name the table that it reads."),
        'f' => ("is a foreign table", hint),
        'S' => ("is a sequence", hint),
        _ => ("is not a table", hint),
    })
}

/// Why a table's place in a tree keeps it from being migrated.
fn tree_problems(relation: &Relation) -> Vec<(&'static str, &'static str)> {
    let mut found = Vec::new();
    if relation.is_child {
        found.push(("is a partition or inherits from another table", "Migrate the partitioned table as a whole."));
    }
    if relation.kind == 'r' && relation.is_parent {
        found.push(("other tables inherit from it", "Inheritance is not supported; declarative partitioning is."));
    }
    found
}

/// Why a partition keeps its table from being migrated.
fn member_problem(member: &Member) -> Option<(String, &'static str)> {
    let (what, hint) = match (member.kind, member.persistence) {
        ('r' | 'p', 'p') => return None,
        ('r' | 'p', _) => {
            ("UNLOGGED or temporary: its rows would not survive a crash", "ALTER TABLE ... SET LOGGED, or detach it.")
        }
        _ => ("no table", "Changes of its rows cannot be captured: detach it."),
    };
    Some((format!("partition {} is {what}", member.name), hint))
}

fn key(
    session: &mut LocalSession,
    named: &NamedTable,
    kind: char,
    table: &mut Table,
    problems: &mut Vec<Problem>,
) -> Result<()> {
    if !matches!(kind, 'r' | 'p') {
        return Ok(());
    }
    if let Some(declared) = &named.key {
        table.key = declared.iter().map(Ident::new).collect();
        if declared.is_empty() || !catalog::is_key(session, table.oid, &table.key)? {
            table.key.clear();
            problems.push(
                Problem::new(&named.first, format!("no unique index makes ({}) a key", declared.join(", "))).hint(
                    "A key is exactly the columns of an immediate, non-partial unique index, and they are NOT NULL.",
                ),
            );
        }
    } else if table.key.is_empty() {
        problems.push(Problem::new(&named.first, "has no primary key").hint(format!(
            "ALTER TABLE {} ADD PRIMARY KEY (...); or name the columns of a unique index in the mapping's \"key\".",
            named.first
        )));
    }
    Ok(())
}

fn expressions(session: &mut LocalSession, named: &NamedTable, pair: &Pair, problems: &mut Vec<Problem>) -> Result<()> {
    session.savepoint()?;
    session.batch(&search_path(&pair.first.rel))?;
    let forward = pair.forward.iter().map(|rule| (rule, &pair.second, &pair.first, "forward", &named.forward));
    let backward = pair.backward.iter().map(|rule| (rule, &pair.first, &pair.second, "backward", &named.backward));
    for ((column, expression), target, source, direction, given) in forward.chain(backward) {
        // One that the mapping leaves out is a column of the same name.
        let object = if given.iter().any(|(name, _)| name == column.as_str()) {
            format!("/tables/{}/{direction}{}", pair.index, pointer_token(column.as_str()))
        } else {
            format!("{}.{column}", target.rel)
        };
        let Some(target) = target.column(column) else { continue };
        session.savepoint()?;
        let cast = format!("SELECT ({expression})::{} FROM {}", target.type_name, source.rel);
        // By itself as well: what closes the parenthesis would be more than one expression.
        let alone = format!("SELECT {expression} FROM {}", source.rel);
        let found = session.objection(&cast).and_then(|objection| session.analyse(&alone).map(|()| objection));
        match found {
            Ok(objection) => {
                session.release()?;
                problems.extend(
                    objection.map(|o| {
                        Problem::new(object, format!("the expression {expression} {}", o.message)).hint(o.hint)
                    }),
                );
            }
            Err(e) if e.is_contention() => return Err(e),
            Err(Error::Server { error, .. }) => {
                session.rollback_to()?;
                let problem =
                    Problem::new(object, format!("the expression {expression} is not valid: {}", error.message));
                problems.push(Problem { hint: error.hint, ..problem });
            }
            Err(e) => return Err(e),
        }
    }
    session.rollback_to()
}

/// Where the names in a table's expressions are looked up: its own schema, then public.
pub fn search_path(rel: &RelName) -> String {
    format!("SET LOCAL search_path = {}, public", rel.schema)
}

/// Checks the mapping against the second server, and describes its tables.
pub fn second_server<S: Session>(
    session: &mut S,
    migration: &Migration,
    pairs: &[Pair],
) -> Result<(Vec<Table>, Vec<Problem>)> {
    let mut problems = Vec::new();
    let mut tables = Vec::new();
    let version = session.query(
        "SELECT current_setting('server_version_num')::int >= 150000, pg_is_in_recovery(), current_setting('server_encoding') = 'UTF8'",
        &[],
    )?;
    if version[0][0].as_deref() != Some("t") {
        problems.push(
            Problem::new("second server", "is older than PostgreSQL 15")
                .hint("The second store needs PostgreSQL 15 or later."),
        );
    }
    if version[0][1].as_deref() == Some("t") {
        problems.push(
            Problem::new("second server", "is a standby").hint("Let the foreign server's options lead to its primary."),
        );
    }
    if version[0][2].as_deref() != Some("t") {
        // A text that it cannot hold could not even be parked there.
        problems.push(
            Problem::new("second server", "the database's encoding is not UTF8")
                .hint("Other encodings are not supported yet."),
        );
    }
    for pair in pairs {
        let name = &pair.second.remote;
        let object = format!("{name} on the second server");
        let Some(mut found) = catalog::describe(session, name)? else {
            problems.push(
                Problem::new(object, "the table does not exist")
                    .hint("Create it there, or correct the foreign table's options."),
            );
            continue;
        };
        if found.kind == 'p' {
            // Its rows are named by ctid, which says nothing over several partitions: an UPDATE would change other rows as well.
            problems.push(Problem::new(&object, "is partitioned").hint(
                "postgres_fdw cannot tell rows of different partitions apart when it updates them. An ordinary table can be a target.",
            ));
        } else if found.kind != 'r' {
            problems.push(Problem::new(&object, "is not a table").hint("A view cannot be a target."));
            continue;
        }
        for (message, hint) in tree_problems(&found) {
            let hint = if found.is_child { "An ordinary table that stands alone can be a target." } else { hint };
            problems.push(Problem::new(&object, message).hint(hint));
        }
        if found.persistence == 'u' {
            problems.push(
                Problem::new(&object, "is UNLOGGED: its rows would not survive a crash")
                    .hint(format!("There: ALTER TABLE {name} SET LOGGED;")),
            );
        }
        for column in pair.second.columns.iter().filter(|c| !c.generated) {
            match found.table.column(&column.remote_name) {
                None => {
                    problems.push(Problem::new(&object, format!("has no column {}", column.remote_name)).hint(format!(
                        "{} says that {} is one: add it there, or correct the foreign table.",
                        pair.second.rel, column.name
                    )))
                }
                Some(remote) if remote.generated => {
                    problems.push(Problem::new(&object, format!("column {} is generated", column.remote_name)).hint(
                        format!(
                            "Its own server derives it: ALTER FOREIGN TABLE {} DROP COLUMN {};",
                            pair.second.rel, column.name
                        ),
                    ));
                }
                Some(_) => {}
            }
        }
        let key = crate::context::remote_key(pair);
        for ((first, _), remote) in pair.key.iter().zip(&key) {
            if let (Some(a), Some(b)) = (pair.first.column(first), found.table.column(remote))
                && !keys_agree(a, b)
            {
                problems.push(
                    Problem::new(
                        &object,
                        format!("key column {remote} has type {}, but {first} has type {}", b.type_name, a.type_name),
                    )
                    .hint(format!("There: ALTER TABLE {name} ALTER COLUMN {remote} TYPE {};", a.type_name)),
                );
            }
        }
        // Without one on the first server there is nothing to ask for.
        if !key.is_empty() && !catalog::is_key(session, found.table.oid, &key)? {
            let columns: Vec<String> = key.iter().map(|k| k.to_string()).collect();
            problems.push(
                Problem::new(&object, format!("no unique index makes ({}) a key", columns.join(", ")))
                    .hint(format!("There: ALTER TABLE {name} ADD PRIMARY KEY ({});", columns.join(", "))),
            );
        }
        let capture = session.query(
            "SELECT count(*) FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid WHERE tgrelid = $1::text::oid \
             AND tgname LIKE 'crossover\\_%' AND p.proname NOT LIKE '%' || $2::text || '%'",
            &[Some(&found.table.oid.to_string()), Some(&migration.tag)],
        )?;
        if capture[0][0].as_deref() != Some("0") {
            problems.push(
                Problem::new(&object, "belongs to another migration")
                    .hint("Perhaps one of another first server. A table is in one migration at a time."),
            );
        }
        if migration.options.target == Target::Empty
            && session.query(&format!("SELECT EXISTS (SELECT FROM {name})"), &[])?[0][0].as_deref() == Some("t")
        {
            problems.push(
                Problem::new(&object, "is not empty")
                    .hint("Empty it, or start with the option {\"target\": \"truncate\"}."),
            );
        }
        found.table.key = key;
        tables.push(found.table);
    }
    Ok((tables, problems))
}

/// Does this migration take the names over at its start?
pub fn takes_over_at_start(migration: &Migration) -> bool {
    migration.options.takeover == Takeover::Start
}
