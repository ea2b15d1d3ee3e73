//! From JSON to rules to SQL. Pure: it knows PostgreSQL's names and types as text, and reaches no server.

pub mod capture;
pub mod constraint;
pub mod form;
pub mod ident;
pub mod model;
pub mod rule;
pub mod sql;
pub mod table;
pub mod text;
pub mod view;
