//! The SQL of managed views, write twins and their triggers. Pure.

use super::ident::{Ident, RelName, dollar_quoted, quote_literal};
use super::rule::Pair;
use super::table::Column;

/// One privilege on a relation, or on one column of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Grant {
    /// Oid of the grantee; 0: PUBLIC
    pub role: u32,
    /// None: PUBLIC
    pub grantee: Option<String>,
    pub privilege: String,
    pub grantable: bool,
    pub column: Option<String>,
}

/// The names of a managed view and of what belongs to it.
#[derive(Debug, Clone)]
pub struct Managed {
    pub view: RelName,
    pub first: RelName,
    pub write: RelName,
}

impl Managed {
    pub fn new(pair: &Pair) -> Managed {
        Managed {
            view: pair.first.rel.clone(),
            first: pair.first.rel.with_suffix(crate::check::FIRST_SUFFIX),
            write: pair.first.rel.with_suffix(crate::check::WRITE_SUFFIX),
        }
    }
}

/// Writes go through INSTEAD OF triggers unless every column is plain and no identity has to be filled in.
pub fn needs_triggers(pair: &Pair) -> bool {
    !pair.is_plain_backward() || pair.first.columns.iter().any(|c| c.identity.is_some())
}

/// The managed view over the first table.
pub fn over_first(pair: &Pair, managed: &Managed) -> String {
    let columns: Vec<String> = pair.first.columns.iter().map(|c| format!("    {}", c.name)).collect();
    format!("SELECT\n{}\nFROM {}", columns.join(",\n"), managed.first)
}

/// The managed view over the second store, through the backward rule.
pub fn over_second(pair: &Pair) -> String {
    let columns: Vec<String> =
        pair.first.columns.iter().map(|c| format!("    {} AS {}", backward(pair, c), c.name)).collect();
    format!("SELECT\n{}\nFROM {}", columns.join(",\n"), pair.second.rel)
}

fn backward(pair: &Pair, column: &Column) -> String {
    let collation = column.collation.as_ref().map(|c| format!(" COLLATE {c}")).unwrap_or_default();
    match pair.backward_of(&column.name) {
        None => format!("NULL::{}{collation}", column.type_name),
        Some(expression) => match super::rule::plain_column(expression, &pair.second) {
            Some(source) if source.type_name == column.type_name && source.collation == column.collation => {
                source.name.to_string()
            }
            _ => format!("({expression})::{}{collation}", column.type_name),
        },
    }
}

/// The view of the second shape.
pub fn second_shape(pair: &Pair) -> String {
    let columns: Vec<String> = pair.second.columns.iter().map(|c| format!("    {}", c.name)).collect();
    format!("SELECT\n{}\nFROM {}", columns.join(",\n"), pair.second.rel)
}

/// Defaults of the managed view: the table's own. Identities are filled in by the table, or by the trigger.
pub fn defaults(pair: &Pair, view: &RelName) -> String {
    pair.first
        .columns
        .iter()
        .filter_map(|c| {
            c.default.as_ref().map(|d| format!("ALTER VIEW {view} ALTER COLUMN {} SET DEFAULT {d};\n", c.name))
        })
        .collect()
}

/// Defaults of the second shape: a key that the first table takes from a sequence takes it from there as well.
pub fn second_defaults(pair: &Pair, view: &RelName) -> String {
    pair.second
        .columns
        .iter()
        .filter_map(|c| {
            let inherited = || {
                let (first, _) = pair.key.iter().find(|(_, second)| *second == c.name)?;
                let first = pair.first.column(first)?;
                match first.identity {
                    Some(_) => Some(identity_next(pair, first)),
                    None => first.default.clone(),
                }
            };
            let default = c.default.clone().or_else(inherited)?;
            Some(format!("ALTER VIEW {view} ALTER COLUMN {} SET DEFAULT {default};\n", c.name))
        })
        .collect()
}

/// The next value of an identity column's sequence.
fn identity_next(pair: &Pair, column: &Column) -> String {
    let table = Managed::new(pair).first.to_string();
    format!(
        "nextval(pg_catalog.pg_get_serial_sequence({}, {}))",
        quote_literal(&table),
        quote_literal(column.name.as_str())
    )
}

/// The write twin: the managed view's rows, locked, so that what an UPDATE computes it computes from the current row.
pub fn create_write_twin(pair: &Pair, managed: &Managed) -> String {
    let mut sql = format!("CREATE VIEW {} AS {} FOR UPDATE;\n", managed.write, over_second(pair));
    sql += &format!(
        "COMMENT ON VIEW {} IS 'pg_crossover: UPDATE and DELETE of {} run over this view, which locks the rows';\n",
        managed.write,
        managed.view.to_string().replace('\'', "''")
    );
    sql
}

/// The INSTEAD OF triggers of the managed view and its write twin, and their function.
pub fn create_triggers(pair: &Pair, managed: &Managed) -> String {
    let function = &managed.write;
    let second = &pair.second.rel;
    let key = |record: &str| -> String {
        let on: Vec<String> = pair.key.iter().map(|(_, c)| format!("t.{c} = {record}.{c}")).collect();
        on.join(" AND ")
    };
    let forward = |record: &str, into: &str| {
        let values: Vec<String> = pair
            .second
            .columns
            .iter()
            .map(|c| {
                let rule = pair.forward.iter().find(|(name, _)| *name == c.name);
                rule.map_or_else(|| format!("NULL::{}", c.type_name), |(_, e)| format!("({e})::{}", c.cast_type))
            })
            .collect();
        format!("SELECT {} INTO {into} FROM (SELECT {record}.*) AS {};", values.join(", "), pair.first.rel.name)
    };
    let back = |record: &str, into: &str| {
        let values: Vec<String> = pair
            .first
            .columns
            .iter()
            .map(|c| match pair.backward_of(&c.name) {
                Some(_) => backward(pair, c),
                // Nothing of it is stored on the second side.
                None => format!("NULL::{}", c.type_name),
            })
            .collect();
        format!("SELECT {} INTO {into} FROM (SELECT {record}.*) AS {};", values.join(", "), second.name)
    };
    let columns: Vec<String> = pair.forward.iter().map(|(c, _)| c.to_string()).collect();
    let values: Vec<String> = pair.forward.iter().map(|(c, _)| format!("crossover_new.{c}")).collect();
    let set: Vec<String> = pair
        .forward
        .iter()
        .map(|(c, _)| {
            format!("{c} = CASE WHEN crossover_new.{c}::text IS DISTINCT FROM crossover_old.{c}::text THEN crossover_new.{c} ELSE t.{c} END")
        })
        .collect();
    let unmapped: String = pair
        .first
        .columns
        .iter()
        .filter(|c| pair.backward_of(&c.name).is_none())
        .map(|c| {
            format!(
                "    IF NEW.{n}::text IS DISTINCT FROM OLD.{n}::text THEN\n        RAISE EXCEPTION 'column % has no place in the second store', {l} USING ERRCODE = 'feature_not_supported', HINT = 'The mapping gives it no expression.';\n    END IF;\n",
                n = c.name,
                l = quote_literal(c.name.as_str())
            )
        })
        .collect();
    let identities: String = pair
        .first
        .columns
        .iter()
        .filter(|c| c.identity.is_some())
        .map(|c| {
            format!(
                "        IF NEW.{n} IS NULL THEN NEW.{n} := {next}; END IF;\n",
                n = c.name,
                next = identity_next(pair, c)
            )
        })
        .collect();
    dollar_quoted(&format!(
        "CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, public, pg_temp AS \0
#variable_conflict use_column
DECLARE
    crossover_old {second};
    crossover_new {second};
    crossover_row {second};
    crossover_now {view};
BEGIN
    IF TG_OP = 'INSERT' THEN
{identities}        {forward_new}
        INSERT INTO {second} ({columns}) VALUES ({values}) RETURNING * INTO crossover_row;
        {back_new}
        RETURN NEW;
    END IF;
    {forward_old}
    IF TG_TABLE_NAME = {view_name} THEN
        -- Not over the write twin: the row that NEW was computed from was not locked.
        SELECT * INTO crossover_row FROM {second} AS t WHERE {key_old} FOR UPDATE;
        IF NOT FOUND THEN
            RETURN NULL;
        END IF;
        {back_now}
        IF crossover_now::text IS DISTINCT FROM OLD::text THEN
            RAISE EXCEPTION 'could not serialize access due to concurrent update' USING ERRCODE = 'serialization_failure', HINT = 'Retry the transaction.';
        END IF;
    END IF;
    IF TG_OP = 'DELETE' THEN
        DELETE FROM {second} AS t WHERE {key_old};
        RETURN CASE WHEN FOUND THEN OLD END;
    END IF;
{unmapped}    {forward_new}
    UPDATE {second} AS t SET {set} WHERE {key_old} RETURNING * INTO crossover_row;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    {back_new}
    RETURN NEW;
END
\0;
CREATE TRIGGER crossover_write INSTEAD OF INSERT OR UPDATE OR DELETE ON {view} FOR EACH ROW EXECUTE FUNCTION {function}();
CREATE TRIGGER crossover_write INSTEAD OF UPDATE OR DELETE ON {write} FOR EACH ROW EXECUTE FUNCTION {function}();
REVOKE ALL ON FUNCTION {function}() FROM PUBLIC;
COMMENT ON FUNCTION {function}() IS 'pg_crossover: writes to {commented} go to the second store through the rules';
",
        commented = managed.view.to_string().replace('\'', "''"),
        schema = pair.first.rel.schema,
        view = managed.view,
        write = managed.write,
        view_name = quote_literal(managed.view.name.as_str()),
        unmapped = unmapped,
        columns = columns.join(", "),
        values = values.join(", "),
        set = set.join(", "),
        key_old = key("crossover_old"),
        forward_new = forward("NEW", "crossover_new"),
        forward_old = forward("OLD", "crossover_old"),
        back_new = back("crossover_row", "NEW"),
        back_now = back("crossover_row", "crossover_now"),
    ))
}

pub fn drop_triggers(managed: &Managed) -> String {
    format!(
        "DROP TRIGGER IF EXISTS crossover_write ON {};\nDROP VIEW IF EXISTS {};\nDROP FUNCTION IF EXISTS {}();\n",
        managed.view, managed.write, managed.write
    )
}

/// Makes the privileges on `rel` exactly `grants`, in their order; `holders` have some now.
pub fn set_grants(rel: &RelName, owner: &Ident, grants: Option<&[Grant]>, holders: &[Grant]) -> String {
    let role = |grantee: &Option<String>| {
        grantee.as_ref().map_or_else(|| "PUBLIC".to_string(), |g| Ident::new(g.clone()).to_string())
    };
    let mut roles: Vec<String> = holders.iter().map(|g| role(&g.grantee)).collect();
    roles.push(owner.to_string());
    roles.sort();
    roles.dedup();
    // Revoking a table's privileges revokes those on its columns, too.
    let mut sql: String = roles.iter().map(|r| format!("REVOKE ALL ON {rel} FROM {r} CASCADE;\n")).collect();
    match grants {
        None => sql += &format!("GRANT ALL ON {rel} TO {owner};\n"),
        Some(grants) => {
            for g in grants {
                let column = g.column.as_ref().map(|c| format!(" ({})", Ident::new(c.clone()))).unwrap_or_default();
                let option =
                    if g.grantable && g.grantee.as_deref() != Some(owner.as_str()) { " WITH GRANT OPTION" } else { "" };
                sql += &format!("GRANT {}{column} ON {rel} TO {}{option};\n", g.privilege, role(&g.grantee));
            }
        }
    }
    sql
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::rule::tests::customer;

    #[test]
    fn the_view_over_second_keeps_names_and_types() {
        let sql = over_second(&customer().unwrap());
        assert!(sql.contains(r#""client_id" AS "id""#), "{sql}");
        assert!(sql.contains(r#"(round(balance * 100)::bigint)::bigint AS "balance_cents""#), "{sql}");
    }

    #[test]
    fn grants_are_exact() {
        let rel = RelName::new("public", "t");
        let grants = [
            Grant {
                role: 16384,
                grantee: Some("app".into()),
                privilege: "SELECT".into(),
                grantable: false,
                column: None,
            },
            Grant { role: 0, grantee: None, privilege: "UPDATE".into(), grantable: false, column: Some("a b".into()) },
        ];
        let sql = set_grants(&rel, &Ident::new("me"), Some(&grants), &grants);
        assert!(sql.contains("REVOKE ALL ON \"public\".\"t\" FROM PUBLIC"), "{sql}");
        assert!(sql.ends_with("GRANT UPDATE (\"a b\") ON \"public\".\"t\" TO PUBLIC;\n"), "{sql}");
    }
}
