//! Who may call, and how the second server is reached.

use pgrx_tests::{Pair, Witness, market};
use postgres::Client;
use serde_json::json;

use super::{CALLS, Expected, NOTHING, bench, one, start};

/// A connection that acts as a role.
fn as_role(pair: &Pair, role: &str) -> Client {
    let mut client = pair.first.connect();
    client.batch_execute(&format!("SET ROLE {role}")).expect("a role");
    client
}

#[test]
fn roles_and_connections() {
    let mut bench = bench();
    let witness = Witness::of(&bench.pair.first);
    let pair = &bench.pair;
    pair.first.sql(
        "CREATE ROLE nobody; CREATE ROLE mover LOGIN;
         GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO mover;
         GRANT USAGE, CREATE ON SCHEMA s1 TO mover; GRANT USAGE ON SCHEMA f2 TO mover; GRANT USAGE ON FOREIGN SERVER second_server TO mover;
         CREATE TABLE s1.moved (LIKE s1.t INCLUDING ALL); ALTER TABLE s1.moved OWNER TO mover; ALTER FOREIGN TABLE f2.t OWNER TO mover",
    );
    pair.second.sql(
        "CREATE ROLE mover LOGIN PASSWORD 'right'; GRANT USAGE ON SCHEMA f2 TO mover; GRANT CREATE ON DATABASE app TO mover; ALTER TABLE f2.t OWNER TO mover",
    );
    bench.set_up();
    let ours = start(&one("s1.moved", "f2.t", &json!({})));
    let superusers = start(&one("s1.t", "f2.t", &json!({})));
    let (mut nobody, mut mover) = (as_role(pair, "nobody"), as_role(pair, "mover"));
    bench.refuses_on(
        &mut nobody,
        "no EXECUTE",
        &ours,
        &Expected::new("42501", "permission denied for function migration_start", "", ""),
    );

    // How the second server is reached.
    let connection = |what: &str| format!("no connection to the second server: …{what}…");
    let check = "Check that the second server runs, and the options of the foreign server and the user mapping.";
    let change = |sql: &str| {
        pair.first.sql(sql);
        bench.set_up();
    };
    change("DROP USER MAPPING FOR PUBLIC SERVER second_server");
    let no_mapping = |object: &str, role: &str| {
        Expected::new(
            "22023",
            "the mapping of migration \"refused\" has …",
            &format!("{object}…"),
            &format!(
                "CREATE USER MAPPING FOR \"{role}\" SERVER \"second_server\" OPTIONS (user '...', password '...');"
            ),
        )
    };
    bench.refuses(
        "no user mapping",
        &superusers,
        &no_mapping("server \"second_server\": role \"postgres\" has no user mapping for it", "postgres"),
    );
    change("CREATE USER MAPPING FOR postgres SERVER second_server OPTIONS (user 'postgres')");
    let whose = "\"s1\".\"moved\": its owner \"mover\", as whom the managed view will be read, has no user mapping for server \"second_server\"";
    bench.refuses("the owner has no user mapping", &ours, &no_mapping(whose, "mover"));
    let needs = "A migration owned by a role that is not a superuser needs a password in the user mapping, and a second server that asks for it.";
    let required = "password is required to connect to the second server";
    change("CREATE USER MAPPING FOR mover SERVER second_server OPTIONS (user 'mover')");
    bench.refuses_on(
        &mut mover,
        "no password",
        &ours,
        &Expected::new("2F003", required, "The user mapping has no password.", needs),
    );
    change("ALTER USER MAPPING FOR mover SERVER second_server OPTIONS (ADD password 'right')");
    bench.refuses_on(
        &mut mover,
        "a password that is not used",
        &ours,
        &Expected::new("2F003", required, "The second server did not ask for the password of the user mapping.", needs),
    );

    pair.second.demand_password(&["mover"]);
    let not_owned = |what: &str| {
        Expected::problem(
            &format!("{what}: is not owned by \"mover\""),
            "All tables of a migration belong to the role that starts it: SET ROLE to their owner.",
        )
    };
    bench.refuses_on(&mut mover, "others' table", &superusers, &not_owned("\"s1\".\"t\""));
    change("ALTER FOREIGN TABLE f2.t OWNER TO postgres");
    bench.refuses_on(&mut mover, "others' foreign table", &ours, &not_owned("\"f2\".\"t\""));
    change(
        "ALTER FOREIGN TABLE f2.t OWNER TO mover; ALTER USER MAPPING FOR mover SERVER second_server OPTIONS (SET password 'wrong')",
    );
    let wrong = Expected::new("08001", &connection("password authentication failed for user \"mover\""), "", check);
    bench.refuses_on(&mut mover, "a wrong password", &ours, &wrong);
    change("ALTER USER MAPPING FOR postgres SERVER second_server OPTIONS (SET user 'mover', ADD password 'wrong')");
    bench.refuses("a superuser's wrong password", &superusers, &wrong);
    change("ALTER USER MAPPING FOR postgres SERVER second_server OPTIONS (SET user 'nobody_there', DROP password)");
    bench.refuses(
        "a role that is not there",
        &superusers,
        &Expected::new("08001", &connection("role \"nobody_there\" does not exist"), "", check),
    );
    change(
        "ALTER USER MAPPING FOR postgres SERVER second_server OPTIONS (SET user 'postgres'); ALTER SERVER second_server OPTIONS (SET dbname 'nowhere')",
    );
    bench.refuses(
        "a database that is not there",
        &superusers,
        &Expected::new("08001", &connection("database \"nowhere\" does not exist"), "", check),
    );
    change("ALTER SERVER second_server OPTIONS (SET dbname 'latin')");
    let latin = "second server: the database's encoding is not UTF8 (Other encodings are not supported yet.)\n\"f2\".\"t\" on the second server: the table does not exist (…)";
    bench.refuses(
        "another encoding",
        &superusers,
        &Expected::new("22023", "the mapping of migration \"refused\" has 2 problems", latin, NOTHING),
    );
    change("ALTER SERVER second_server OPTIONS (SET dbname 'app', SET port '1')");
    bench.refuses(
        "a server that is away",
        &superusers,
        &Expected::new("08001", &connection("Connection refused"), "", check),
    );
    change(&format!("ALTER SERVER second_server OPTIONS (SET port '{}')", pair.second.port()));

    // Another one's migration.
    market::create(&bench.pair, 10);
    market::started(&bench.pair);
    bench.is_live = true;
    bench.set_up();
    for call in CALLS {
        let call = format!("SELECT {call}");
        let owner = Expected::new("42501", "must be owner of migration \"market\"", "", "SET ROLE postgres;");
        bench.refuses_on(&mut mover, &call, &call, &owner);
    }
    witness.testify();
}
