//! What the extension's own tables and PostgreSQL's catalogs say: migrations, tables, servers.
//!
//! Reads and writes single rows in the caller's transaction; takes no locks of its own.

use crate::error::{Error, Result, Side};
use crate::mapping::constraint::{Constraints, Reference, Unique};
use crate::mapping::ident::{Ident, RelName};
use crate::mapping::model::Options;
use crate::mapping::table::{Column, Table};
use crate::mapping::text::array_literal;
use crate::state::{Phase, State};
use crate::store::{Isolation, Row, Session, parse};

/// A server came back from before a point that had been replicated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Divergence {
    /// The store that has lost commits.
    pub lost: Side,
    pub detail: String,
}

/// One row of `crossover.migration`.
#[derive(Debug, Clone)]
pub struct Migration {
    pub id: i32,
    pub name: String,
    pub tag: String,
    pub owner: u32,
    pub owner_name: Ident,
    pub owner_is_superuser: bool,
    pub server_id: u32,
    pub mapping: String,
    pub options: Options,
    pub state: State,
    pub phase: Phase,
    pub paused: bool,
    pub taken_over: bool,
    /// Phase `diverged`.
    pub diverged: Option<Divergence>,
}

impl Migration {
    /// The migration with this id; None when it is gone.
    pub fn load<S: Session>(session: &mut S, id: i32) -> Result<Option<Migration>> {
        let rows = session.admin_query(
            "SELECT id, name, tag, owner::int8, coalesce((SELECT rolname::text FROM pg_roles r WHERE r.oid = owner), ''), server_id::int8, mapping, options, state, phase, paused, taken_over, coalesce((SELECT rolsuper FROM pg_roles r WHERE r.oid = owner), false), \
             diverged, lost FROM crossover.migration WHERE id = $1::text::int",
            &[Some(&id.to_string())],
        )?;
        let Some(row) = rows.into_iter().next() else { return Ok(None) };
        let field = |i: usize| row[i].as_deref().unwrap_or("");
        Ok(Some(Migration {
            id: parse(field(0))?,
            name: field(1).into(),
            tag: field(2).into(),
            owner: parse(field(3))?,
            owner_name: Ident::new(field(4)),
            server_id: parse(field(5))?,
            mapping: field(6).into(),
            options: Options::parse(field(7)).map_err(|p| Error::internal(p.message))?,
            state: parse(field(8))?,
            phase: parse(field(9))?,
            paused: field(10) == "t",
            taken_over: field(11) == "t",
            owner_is_superuser: field(12) == "t",
            diverged: row[13].clone().map(|detail| Divergence {
                lost: if field(14) == "second" { Side::Second } else { Side::First },
                detail,
            }),
        }))
    }

    /// Writes state, phase, takeover and divergence back, in the caller's transaction.
    pub fn store<S: Session>(&self, session: &mut S) -> Result<()> {
        session
            .admin_execute(
                "UPDATE crossover.migration SET state = $2::text, phase = $3::text, taken_over = $4::text::boolean, server_id = $5::text::oid, \
                 diverged = $6::text, lost = $7::text WHERE id = $1::text::int",
                &[
                    Some(&self.id.to_string()),
                    Some(self.state.as_str()),
                    Some(self.phase.as_str()),
                    Some(if self.taken_over { "t" } else { "f" }),
                    Some(&self.server_id.to_string()),
                    self.diverged.as_ref().map(|d| d.detail.as_str()),
                    self.diverged.as_ref().map(|d| d.lost.to_string()).as_deref(),
                ],
            )
            .map(drop)
    }
}

/// What `pg_class` says of a relation beyond its columns.
#[derive(Debug, Clone)]
pub struct Relation {
    pub table: Table,
    pub kind: char,
    pub persistence: char,
    pub owner: u32,
    pub row_security: bool,
    /// A partition, or a child of another table.
    pub is_child: bool,
    /// Has partitions or children.
    pub is_parent: bool,
    /// Foreign server, for a foreign table.
    pub server: Option<u32>,
    pub server_wrapper: Option<String>,
}

const RELATION: &str = "SELECT c.oid::int8, n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text, c.relowner::int8, c.relrowsecurity, \
       EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid), EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = c.oid), \
       f.ftserver::int8, w.fdwname::text, \
       coalesce((SELECT option_value FROM pg_options_to_table(f.ftoptions) WHERE option_name = 'schema_name'), n.nspname::text), \
       coalesce((SELECT option_value FROM pg_options_to_table(f.ftoptions) WHERE option_name = 'table_name'), c.relname::text) \
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
  LEFT JOIN pg_foreign_table f ON f.ftrelid = c.oid LEFT JOIN pg_foreign_server s ON s.oid = f.ftserver \
  LEFT JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw";

// Casting to character and bit types keeps no length, so that an over-long value is an error and not cut.
const COLUMNS: &str = "SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), \
       CASE WHEN a.atttypid IN (1042, 1043, 1560, 1562) THEN format_type(a.atttypid, -1) ELSE format_type(a.atttypid, a.atttypmod) END, \
       a.atttypid::int8, a.attnotnull, a.attgenerated <> '', nullif(a.attidentity::text, ''), \
       CASE WHEN a.attgenerated = '' THEN pg_get_expr(d.adbin, d.adrelid) END, \
       (SELECT quote_ident(cn.nspname) || '.' || quote_ident(co.collname) FROM pg_collation co JOIN pg_namespace cn ON cn.oid = co.collnamespace \
         WHERE co.oid = a.attcollation AND a.attcollation <> t.typcollation), \
       coalesce((SELECT option_value FROM pg_options_to_table(a.attfdwoptions) WHERE option_name = 'column_name'), a.attname::text), \
       (t.typtype = 'e' AND NOT EXISTS (SELECT FROM pg_cast WHERE castsource = t.oid AND casttarget = 'text'::regtype) OR coalesce(nullif(t.typbasetype, 0), t.oid) = ANY (ARRAY['bool', '\"char\"', 'name', 'int8', 'int2', 'int4', 'text', 'oid', 'bpchar', \
           'varchar', 'date', 'time', 'timestamp', 'timestamptz', 'numeric', 'uuid', 'bytea', 'inet', 'cidr', 'macaddr', 'macaddr8', 'bit', 'varbit', 'pg_lsn', 'xid8']::regtype[])) \
       AND NOT EXISTS (SELECT FROM pg_collation co WHERE co.oid = a.attcollation AND NOT co.collisdeterministic), \
       EXISTS (SELECT FROM pg_cast WHERE castsource = coalesce(nullif(t.typbasetype, 0), t.oid) AND casttarget = 'text'::regtype AND castmethod = 'f'), \
       EXISTS (SELECT FROM pg_cast WHERE castsource = 'text'::regtype AND casttarget = coalesce(nullif(t.typbasetype, 0), t.oid) AND castmethod = 'f'), \
       format_type(coalesce(nullif(t.typbasetype, 0), t.oid), -1) \
  FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
 WHERE a.attrelid = $1::text::oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";

/// Reads a relation by name, here or on the second server; None when there is none.
pub fn describe<S: Session>(session: &mut S, rel: &RelName) -> Result<Option<Relation>> {
    let rows = session.query(
        &format!("{RELATION} WHERE n.nspname = $1::text::name AND c.relname = $2::text::name"),
        &[Some(rel.schema.as_str()), Some(rel.name.as_str())],
    )?;
    relation(session, rows)
}

pub fn describe_oid<S: Session>(session: &mut S, oid: u32) -> Result<Option<Relation>> {
    let rows = session.query(&format!("{RELATION} WHERE c.oid = $1::text::oid"), &[Some(&oid.to_string())])?;
    relation(session, rows)
}

fn relation<S: Session>(session: &mut S, rows: Vec<Row>) -> Result<Option<Relation>> {
    let Some(row) = rows.into_iter().next() else { return Ok(None) };
    let field = |i: usize| row[i].as_deref().unwrap_or("");
    let oid: u32 = parse(field(0))?;
    let columns = session.query(COLUMNS, &[Some(&oid.to_string())])?.into_iter().map(column).collect::<Result<_>>()?;
    let key = session.query(
        "SELECT a.attname::text FROM pg_index i, unnest(i.indkey) WITH ORDINALITY k(attnum, n) \
         JOIN pg_attribute a ON a.attnum = k.attnum WHERE i.indrelid = $1::text::oid AND i.indisprimary AND i.indimmediate AND a.attrelid = i.indrelid ORDER BY k.n",
        &[Some(&oid.to_string())],
    )?;
    let first_char = |i: usize| field(i).chars().next().unwrap_or(' ');
    Ok(Some(Relation {
        table: Table {
            rel: RelName::new(field(1), field(2)),
            oid,
            columns,
            key: key.into_iter().filter_map(|mut r| r.pop().flatten()).map(Ident::new).collect(),
            remote: RelName::new(field(11), field(12)),
        },
        kind: first_char(3),
        persistence: first_char(4),
        owner: parse(field(5))?,
        row_security: field(6) == "t",
        is_child: field(7) == "t",
        is_parent: field(8) == "t",
        server: row[9].as_deref().map(parse).transpose()?,
        server_wrapper: row[10].clone(),
    }))
}

fn column(row: Row) -> Result<Column> {
    let field = |i: usize| row[i].clone().unwrap_or_default();
    Ok(Column {
        name: Ident::new(field(0)),
        type_name: field(1),
        cast_type: field(2),
        type_oid: parse(&field(3))?,
        not_null: field(4) == "t",
        generated: field(5) == "t",
        identity: row[6].as_deref().and_then(|s| s.chars().next()),
        default: row[7].clone(),
        collation: row[8].clone(),
        remote_name: Ident::new(field(9)),
        one_text: field(10) == "t",
        cast_to_text: field(11) == "t",
        cast_of_text: field(12) == "t",
        base_type: field(13),
    })
}

/// A table and its partitions, at every depth, the table itself first.
pub struct Member {
    pub oid: u32,
    pub name: String,
    pub kind: char,
    pub persistence: char,
}

/// The tree below a table, here or on the second server.
pub fn tree<S: Session>(session: &mut S, oid: u32) -> Result<Vec<Member>> {
    let rows = session.query(
        "WITH RECURSIVE tree AS (SELECT $1::text::oid AS rel, 0 AS depth UNION ALL \
            SELECT h.inhrelid, depth + 1 FROM tree JOIN pg_inherits h ON h.inhparent = tree.rel) \
         SELECT c.oid::int8, c.oid::regclass::text, c.relkind::text, c.relpersistence::text FROM tree JOIN pg_class c ON c.oid = rel ORDER BY depth, rel",
        &[Some(&oid.to_string())],
    )?;
    let first_char = |text: &Option<String>| text.as_deref().and_then(|t| t.chars().next()).unwrap_or(' ');
    rows.into_iter()
        .map(|r| {
            Ok(Member {
                oid: parse(r[0].as_deref().unwrap_or(""))?,
                kind: first_char(&r[2]),
                persistence: first_char(&r[3]),
                name: r[1].clone().unwrap_or_default(),
            })
        })
        .collect()
}

/// Is there an immediate, non-partial unique index over exactly these columns, all of them NOT NULL?
pub fn is_key<S: Session>(session: &mut S, oid: u32, columns: &[Ident]) -> Result<bool> {
    let names = array_literal(columns.iter().map(|c| c.as_str()));
    let rows = session.query(
        "SELECT count(*) FROM pg_index i WHERE i.indrelid = $1::text::oid AND i.indisunique AND i.indimmediate AND i.indisvalid \
         AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indnkeyatts = cardinality($2::text[]) \
         AND (SELECT count(*) FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]) \
              AND a.attnotnull AND a.attname = ANY ($2::text[])) = i.indnkeyatts",
        &[Some(&oid.to_string()), Some(&names)],
    )?;
    Ok(rows.first().and_then(|r| r[0].as_deref()) != Some("0"))
}

/// The unique indexes of `table` beside its key's.
pub fn uniques<S: Session>(session: &mut S, oid: u32, key: &[Ident]) -> Result<Vec<Unique>> {
    let rows = session.query(
        "SELECT i.indexrelid::int8, pg_get_indexdef(i.indexrelid, n, true), pg_get_expr(i.indpred, i.indrelid), i.indnullsnotdistinct, NOT i.indimmediate \
         FROM pg_index i, generate_series(1, i.indnkeyatts) AS n WHERE i.indrelid = $1::text::oid AND i.indisunique AND i.indisvalid ORDER BY 1, n",
        &[Some(&oid.to_string())],
    )?;
    let mut found: Vec<(String, Unique)> = Vec::new();
    for row in rows {
        let field = |i: usize| row[i].clone().unwrap_or_default();
        match found.last_mut() {
            Some((index, unique)) if *index == field(0) => unique.expressions.push(field(1)),
            _ => found.push((
                field(0),
                Unique {
                    expressions: vec![field(1)],
                    predicate: row[2].clone(),
                    nulls_not_distinct: field(3) == "t",
                    deferrable: field(4) == "t",
                },
            )),
        }
    }
    Ok(found.into_iter().map(|(_, unique)| unique).filter(|u| !u.is_over(key)).collect())
}

/// The foreign keys from and to the tables with these oids, which are in the mapping's order.
pub fn references<S: Session>(session: &mut S, oids: &[u32]) -> Result<Vec<Reference>> {
    let rows = session.query(
        "SELECT c.oid::int8, c.conname::text, c.conrelid::int8, c.confrelid::int8, cn.nspname::text, cr.relname::text, pn.nspname::text, pr.relname::text, \
                ca.attname::text, pa.attname::text \
           FROM pg_constraint c JOIN pg_class cr ON cr.oid = c.conrelid JOIN pg_namespace cn ON cn.oid = cr.relnamespace \
           JOIN pg_class pr ON pr.oid = c.confrelid JOIN pg_namespace pn ON pn.oid = pr.relnamespace, \
                unnest(c.conkey, c.confkey) WITH ORDINALITY AS k(child, parent, n), pg_attribute ca, pg_attribute pa \
          WHERE c.contype = 'f' AND c.conparentid = 0 AND (c.conrelid = ANY ($1::text::oid[]) OR c.confrelid = ANY ($1::text::oid[])) \
            AND ca.attrelid = c.conrelid AND ca.attnum = k.child AND pa.attrelid = c.confrelid AND pa.attnum = k.parent ORDER BY 1, k.n",
        &[Some(&array_literal(oids.iter().map(u32::to_string)))],
    )?;
    let mut found: Vec<(String, Reference)> = Vec::new();
    for row in rows {
        let field = |i: usize| row[i].as_deref().unwrap_or("");
        let column = (Ident::new(field(8)), Ident::new(field(9)));
        let place = |i: usize| -> Result<Option<usize>> {
            let oid: u32 = parse(field(i))?;
            Ok(oids.iter().position(|o| *o == oid))
        };
        match found.last_mut() {
            Some((oid, reference)) if oid == field(0) => reference.columns.push(column),
            _ => found.push((
                field(0).to_string(),
                Reference {
                    name: field(1).to_string(),
                    child: RelName::new(field(4), field(5)),
                    parent: RelName::new(field(6), field(7)),
                    child_index: place(2)?,
                    parent_index: place(3)?,
                    columns: vec![column],
                    mirrored: false,
                },
            )),
        }
    }
    Ok(found.into_iter().map(|(_, reference)| reference).collect())
}

/// All constraints of a store's tables, given by oid and key in the mapping's order.
pub fn constraints<S: Session>(session: &mut S, tables: &[(u32, Vec<Ident>)]) -> Result<Constraints> {
    let uniques = tables.iter().map(|(oid, key)| uniques(session, *oid, key)).collect::<Result<_>>()?;
    let oids: Vec<u32> = tables.iter().map(|(oid, _)| *oid).collect();
    Ok(Constraints { uniques, references: references(session, &oids)? })
}

/// Writes down anew which foreign server each migration's tables lie on, where the one written down is not there: pg_upgrade gives servers other
/// oids, tables keep theirs. In a transaction of its own.
pub fn find_servers_again<S: Session>(session: &mut S) -> Result<()> {
    session.begin(Isolation::ReadCommitted, &[])?;
    let found = session.admin_execute(
        "UPDATE crossover.migration AS m SET server_id = f.ftserver FROM pg_foreign_table AS f \
         WHERE m.server_id <> 0 AND NOT EXISTS (SELECT FROM pg_foreign_server s WHERE s.oid = m.server_id) \
         AND f.ftrelid = to_regclass(m.mapping::jsonb #>> '{tables,0,second}')",
        &[],
    );
    let found = found.and_then(|_| session.commit());
    if found.is_err() {
        session.rollback();
    }
    found
}

/// The options by which `owner` reaches a foreign server: the server's, then the user mapping's.
pub fn connection_options<S: Session>(session: &mut S, server: u32, owner: u32) -> Result<Vec<(String, String)>> {
    let rows = session.admin_query(
        "SELECT option_name, option_value FROM pg_foreign_server s, pg_options_to_table(s.srvoptions) WHERE s.oid = $1::text::oid",
        &[Some(&server.to_string())],
    )?;
    // Without options libpq would connect to wherever its defaults lead.
    let exists =
        session.query("SELECT FROM pg_foreign_server WHERE oid = $1::text::oid", &[Some(&server.to_string())])?;
    if exists.is_empty() {
        return Err(Error::RemoteConnection { message: "its foreign server does not exist".into() });
    }
    let mapping = session.admin_query(
        "SELECT o.option_name, o.option_value FROM (SELECT u.umoptions, u.umuser FROM pg_user_mapping u \
         WHERE u.umserver = $1::text::oid AND u.umuser IN (0, $2::text::oid) ORDER BY u.umuser DESC LIMIT 1) u, pg_options_to_table(u.umoptions) o",
        &[Some(&server.to_string()), Some(&owner.to_string())],
    )?;
    let pairs = |rows: Vec<Row>| {
        rows.into_iter().filter_map(|r| {
            let mut r = r.into_iter();
            Some((r.next()??, r.next()??))
        })
    };
    Ok(pairs(rows).chain(pairs(mapping)).collect())
}

/// A change of state, for `migration_history`.
pub struct Move<'a> {
    pub name: &'a str,
    pub who: &'a str,
    pub from: Option<State>,
    pub to: State,
    pub pause_ms: Option<f64>,
    pub drained: Option<i64>,
    /// Why, where nobody asked for it.
    pub reason: Option<&'a str>,
    pub forced: bool,
}

impl<'a> Move<'a> {
    pub fn new(name: &'a str, who: &'a str, from: Option<State>, to: State) -> Self {
        Move { name, who, from, to, pause_ms: None, drained: None, reason: None, forced: false }
    }
}

/// Records a change of state, in its transaction.
pub fn record_history<S: Session>(session: &mut S, made: &Move) -> Result<()> {
    let (pause, drained) = (made.pause_ms.map(|p| format!("{p:.1}")), made.drained.map(|d| d.to_string()));
    session
        .admin_execute(
            "INSERT INTO crossover.history (name, who, from_state, to_state, pause_ms, rows_drained, reason, forced) \
             VALUES ($1::text, $2::text, $3::text, $4::text, $5::text::numeric, $6::text::bigint, $7::text, $8::text::boolean)",
            &[
                Some(made.name),
                Some(made.who),
                made.from.map(State::as_str),
                Some(made.to.as_str()),
                pause.as_deref(),
                drained.as_deref(),
                made.reason,
                Some(if made.forced { "t" } else { "f" }),
            ],
        )
        .map(drop)
}
