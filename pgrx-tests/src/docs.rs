//! The pages of the documentation as tests: their fenced blocks, what is said of them, and how they are run.
//!
//! What an opening fence says decides what becomes of its block; GitHub shows none of it but the language:
//!
//! - `sql SERVER [ROLE][@DATABASE] [fails]`: fed to psql on that server, `first` or `second`. Without a role it is the superuser
//!   `postgres`, without a database the page's own. `fails`: an error is what the page means to show;
//! - `sh SERVER`: run by bash with the server's address in the environment;
//! - `conf SERVER postgresql.conf`: appended to that file, and the server restarted; `conf SERVER pg_hba.conf`: put before its lines;
//! - `json`: a mapping, which `migration_start` has to accept;
//! - `text output`: what the block before it prints. `…` stands for what differs from run to run;
//! - `text diagram` and `mermaid`: pictures.
//!
//! `<!-- not run: reason -->` before a fence `sh` exempts its block, `<!-- test: fixture -->` says what the blocks after it need. Every fence has
//! to be one of these.

use std::fs;
use std::path::{Path, PathBuf};

/// What a page says to its test, in the page's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// `<!-- test: … -->`
    Fixture(String),
    Block(Block),
}

/// A fenced block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The file's name and the line of the fence, for messages.
    pub place: String,
    pub kind: Kind,
    pub text: String,
    /// What it prints, where the page says so.
    pub output: Option<String>,
    /// Why it is not run.
    pub exempt: Option<String>,
}

/// What a block is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Sql { server: Server, role: String, database: Option<String>, fails: bool },
    Shell { server: Server },
    Conf { server: Server, file: String },
    Mapping,
    Picture,
}

/// Which server a block is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    First,
    Second,
}

/// The project's directory.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the manifest is in a directory").to_owned()
}

/// All pages that a user may read: the README and what is in docs/.
pub fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(root().join("docs")).expect("docs/ to be there");
    let mut pages: Vec<PathBuf> = docs.map(|entry| entry.expect("an entry").path()).collect();
    pages.retain(|page| page.extension().is_some_and(|e| e == "md"));
    pages.push(root().join("README.md"));
    pages.sort();
    pages
}

/// The items of a page.
///
/// # Errors
/// A fence or comment that is not as described above, with its place.
pub fn items(name: &str, text: &str) -> Result<Vec<Item>, String> {
    let mut items: Vec<Item> = Vec::new();
    let mut exempt = None;
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let place = format!("{name}:{}", number + 1);
        if let Some(comment) = line.trim().strip_prefix("<!--").and_then(|l| l.strip_suffix("-->")) {
            match comment.trim().split_once(": ") {
                Some(("not run", reason)) if reason.split_whitespace().count() > 2 => exempt = Some(reason.to_owned()),
                Some(("test", fixture)) => items.push(Item::Fixture(fixture.to_owned())),
                _ => return Err(format!("{place}: neither a fixture nor a reason: {line}")),
            }
            continue;
        }
        let Some(info) = line.trim_start().strip_prefix("```") else {
            if exempt.is_some() && !line.trim().is_empty() {
                return Err(format!("{place}: a reason without a block"));
            }
            continue;
        };
        if line.starts_with(' ') {
            return Err(format!("{place}: a fence that does not begin its line"));
        }
        let mut body = String::new();
        loop {
            let (_, line) = lines.next().ok_or_else(|| format!("{place}: a block without an end"))?;
            if line.starts_with("```") {
                break;
            }
            body.push_str(line);
            body.push('\n');
        }
        if info == "text output" {
            match items.last_mut() {
                Some(Item::Block(block)) if block.output.is_none() => block.output = Some(body),
                _ => return Err(format!("{place}: the output of nothing")),
            }
            continue;
        }
        let exempt = exempt.take();
        let kind = kind(info, exempt.is_some())
            .ok_or_else(|| format!("{place}: nothing says how to test a block \"{info}\""))?;
        items.push(Item::Block(Block { place, kind, text: body, output: None, exempt }));
    }
    Ok(items)
}

fn kind(info: &str, exempt: bool) -> Option<Kind> {
    let words: Vec<&str> = info.split_whitespace().collect();
    let server = |word: &str| match word {
        "first" => Some(Server::First),
        "second" => Some(Server::Second),
        _ => None,
    };
    Some(match words[..] {
        ["text", "diagram"] | ["mermaid"] => Kind::Picture,
        ["sh"] if exempt => Kind::Picture,
        ["json"] => Kind::Mapping,
        ["sh", on] => Kind::Shell { server: server(on)? },
        ["conf", on, file @ ("postgresql.conf" | "pg_hba.conf")] => {
            Kind::Conf { server: server(on)?, file: file.to_owned() }
        }
        ["sql", on, ref rest @ ..] => {
            let (fails, rest) = match rest {
                [rest @ .., "fails"] => (true, rest),
                rest => (false, rest),
            };
            let session = match rest {
                [] => "",
                [session] => session,
                _ => return None,
            };
            let (role, database) = session.split_once('@').map_or((session, None), |(r, d)| (r, Some(d.to_owned())));
            let role = if role.is_empty() { "postgres" } else { role }.to_owned();
            Kind::Sql { server: server(on)?, role, database, fails }
        }
        _ => return None,
    })
}

/// Whether `printed` is what the page shows: blanks and the widths of columns apart, and with anything in place of each `…`.
///
/// # Errors
/// The first line that differs.
pub fn is_as_shown(shown: &str, printed: &str) -> Result<(), String> {
    let lines = |text: &str| -> Vec<String> { text.lines().map(plain).filter(|l| !l.is_empty()).collect() };
    let (shown, printed) = (lines(shown), lines(printed));
    for i in 0..shown.len().max(printed.len()) {
        let (want, got) = (shown.get(i), printed.get(i));
        if !want.zip(got).is_some_and(|(want, got)| fits(want, got)) {
            let or_end = |line: Option<&String>| line.map_or("the end".to_owned(), Clone::clone);
            return Err(format!("the page shows: {}\n     psql shows: {}", or_end(want), or_end(got)));
        }
    }
    Ok(())
}

/// A line without what depends on the width of its columns.
fn plain(line: &str) -> String {
    if !line.is_empty() && line.chars().all(|c| "-+".contains(c)) {
        return "-".to_owned();
    }
    let cells: Vec<String> =
        line.split('|').map(|cell| cell.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    cells.join("|")
}

fn fits(pattern: &str, line: &str) -> bool {
    let pieces: Vec<&str> = pattern.split('…').collect();
    let [first, middle @ .., last] = &pieces[..] else { return pattern == line };
    let Some(mut rest) = line.strip_prefix(first) else { return false };
    for piece in middle {
        let Some(at) = rest.find(piece) else { return false };
        rest = &rest[at + piece.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_nobody_runs_is_an_error() {
        let items = |text: &str| items("page.md", text);
        assert!(items("a\n```\nx\n```\n").is_err());
        assert!(items("```sql\nSELECT 1;\n```\n").is_err());
        assert!(items("```sql third\nSELECT 1;\n```\n").is_err());
        assert!(items("  ```sql first\nSELECT 1;\n  ```\n").is_err());
        assert!(items("```sql first\nSELECT 1;\n").is_err());
        assert!(items("```text output\nx\n```\n").is_err());
        assert!(items("<!-- not run: it would drop the database -->\n```sql\nx\n```\n").is_err());
        assert!(items("<!-- not run: no -->\n```sh\nx\n```\n").is_err());
        assert!(items("<!-- not run: it would format the disk -->\ntext\n```sh\nx\n```\n").is_err());
        assert_eq!(items("<!-- not run: it would format the disk -->\n```sh\nx\n```\n").map(|i| i.len()), Ok(1));
    }

    #[test]
    fn a_block_says_where_it_runs() {
        let found = items(
            "p",
            "<!-- test: shop -->\n```sql first mover@shop fails\nSELECT 1;\n```\n\n```text output\n 1\n```\n",
        );
        let kind =
            Kind::Sql { server: Server::First, role: "mover".into(), database: Some("shop".into()), fails: true };
        let (place, text, output) = ("p:2".into(), "SELECT 1;\n".into(), Some(" 1\n".into()));
        let block = Block { place, kind, text, output, exempt: None };
        assert_eq!(found, Ok(vec![Item::Fixture("shop".into()), Item::Block(block)]));
    }

    #[test]
    fn what_is_shown_is_compared_by_its_cells() {
        let printed = " name | rows \n------+------\n crm  |   12\n(1 row)\n\n";
        assert_eq!(is_as_shown(" name | rows\n---+--\n crm | …\n(1 row)", printed), Ok(()));
        assert!(is_as_shown(" name | rows\n---+--\n crm | 13\n(1 row)", printed).is_err());
        assert!(is_as_shown(" name | rows\n---+--\n", printed).is_err());
        assert!(is_as_shown(" name | rows\n---+--\n crm | …\n(1 row)\nmore", printed).is_err());
    }
}
