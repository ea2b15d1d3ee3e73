//! An argument of type jsonb as its text. pgrx reads it into a value, and panics where a document is deeper, or a number larger, than
//! that can be; whoever parses the text can say so.

use std::ffi::CStr;

use pgrx::callconv::{Arg, ArgAbi};
use pgrx::pg_sys;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::prelude::*;

pub struct Document(pub String);

impl FromDatum for Document {
    unsafe fn from_polymorphic_datum(datum: pg_sys::Datum, is_null: bool, _: pg_sys::Oid) -> Option<Document> {
        if is_null {
            return None;
        }
        // SAFETY: the datum is a jsonb, as the function is declared; its output function makes a string of the server's encoding,
        // which lives until the statement ends.
        unsafe {
            let text = pg_sys::OidOutputFunctionCall(pg_sys::F_JSONB_OUT.into(), datum);
            Some(Document(CStr::from_ptr(text).to_string_lossy().into_owned()))
        }
    }
}

// SAFETY: an argument that is passed as any other value, by datum.
unsafe impl<'fcx> ArgAbi<'fcx> for Document {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: the functions that take it are strict: there is a value.
        unsafe { arg.unbox_arg_using_from_datum() }.unwrap_or(Document(String::new()))
    }
}

// SAFETY: says that it is a jsonb, which is what it is read from.
unsafe impl SqlTranslatable for Document {
    const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!(Document);
    const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
    const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal("jsonb"));
    const RETURN_SQL: Result<ReturnsRef, ReturnsError> = Ok(ReturnsRef::One(SqlMappingRef::literal("jsonb")));
}
