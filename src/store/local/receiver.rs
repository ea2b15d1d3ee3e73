//! A query's rows, handed over one by one as the executor makes them, so that no more than one of them is in memory.

use std::ffi::{CStr, c_char, c_int};
use std::ops::ControlFlow;

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::c_sql;
use crate::error::{Error, Result};
use crate::store::Each;

/// A destination of the executor's. Its first field is what the executor knows of it.
#[repr(C)]
struct Receiver<'r, 'e> {
    base: pg_sys::DestReceiver,
    output: Vec<pg_sys::FmgrInfo>,
    /// Of one row; emptied after it.
    memory: pg_sys::MemoryContext,
    each: &'r mut Each<'e>,
    error: Option<Error>,
}

/// Runs a query on the open SPI connection, with a snapshot as any other statement has. An error of `each` ends it, as `Break` does.
pub(super) fn stream(sql: &str, params: &[Option<&str>], each: &mut Each) -> Result<()> {
    let source = c_sql(sql);
    let base = pg_sys::DestReceiver {
        receiveSlot: Some(receive),
        rStartup: Some(start_up),
        rShutdown: Some(ignore),
        rDestroy: Some(ignore),
        // Any but those that mean something to SPI.
        mydest: pg_sys::CommandDest::DestTuplestore,
    };
    // SAFETY: SPI is connected; the receiver outlives the call, and its memory belongs to SPI's procedure context.
    unsafe {
        let memory = pg_sys::AllocSetContextCreateInternal(
            pg_sys::CurrentMemoryContext,
            c"crossover row".as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as pg_sys::Size,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as pg_sys::Size,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as pg_sys::Size,
        );
        let mut receiver = Receiver { base, output: Vec::new(), memory, each, error: None };
        let options = pg_sys::SPIExecuteOptions {
            params: parameters(params),
            // A new snapshot, which shows what came before in this transaction, as for any other statement.
            read_only: false,
            dest: (&raw mut receiver).cast(),
            ..Default::default()
        };
        let code = pg_sys::SPI_execute_extended(source.as_ptr(), &options);
        if code < 0 {
            error!("SPI failed with {code} for: {sql}");
        }
        pg_sys::MemoryContextDelete(memory);
        receiver.error.map_or(Ok(()), Err)
    }
}

/// Text parameters, in the current memory context.
unsafe fn parameters(params: &[Option<&str>]) -> pg_sys::ParamListInfo {
    // SAFETY: the list is made with as many places as are filled.
    unsafe {
        let list = pg_sys::makeParamList(params.len() as c_int);
        for (place, param) in (*list).params.as_mut_slice(params.len()).iter_mut().zip(params) {
            place.ptype = pg_sys::TEXTOID;
            place.pflags = pg_sys::PARAM_FLAG_CONST as u16;
            place.isnull = param.is_none();
            place.value = param.map_or(pg_sys::Datum::from(0), |text| {
                pg_sys::Datum::from(pg_sys::cstring_to_text_with_len(text.as_ptr().cast(), text.len() as c_int))
            });
        }
        list
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn start_up(base: *mut pg_sys::DestReceiver, _operation: c_int, row: pg_sys::TupleDesc) {
    // SAFETY: `base` is the first field of the receiver that `stream` has made; the functions' own memory lasts as long as the query.
    unsafe {
        let receiver = &mut *base.cast::<Receiver>();
        receiver.output = (1..=(*row).natts)
            .map(|column| {
                let (mut function, mut is_varlena) = (pg_sys::InvalidOid, false);
                pg_sys::getTypeOutputInfo(pg_sys::SPI_gettypeid(row, column), &mut function, &mut is_varlena);
                let mut info = pg_sys::FmgrInfo::default();
                pg_sys::fmgr_info(function, &mut info);
                info
            })
            .collect();
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn receive(slot: *mut pg_sys::TupleTableSlot, base: *mut pg_sys::DestReceiver) -> bool {
    // SAFETY: as in `start_up`; the slot holds a row with as many values as there are output functions, each of which returns a
    // NUL-terminated string in the row's memory.
    unsafe {
        let receiver = &mut *base.cast::<Receiver>();
        pg_sys::slot_getallattrs(slot);
        let before = pg_sys::MemoryContextSwitchTo(receiver.memory);
        let texts: Vec<*mut c_char> = receiver
            .output
            .iter_mut()
            .enumerate()
            .map(|(i, function)| match *(*slot).tts_isnull.add(i) {
                true => std::ptr::null_mut(),
                false => pg_sys::OutputFunctionCall(function, *(*slot).tts_values.add(i)),
            })
            .collect();
        pg_sys::MemoryContextSwitchTo(before);
        let row: Vec<Option<&[u8]>> =
            texts.iter().map(|text| (!text.is_null()).then(|| CStr::from_ptr(*text).to_bytes())).collect();
        let next = (receiver.each)(&row);
        pg_sys::MemoryContextReset(receiver.memory);
        match next {
            Ok(flow) => flow == ControlFlow::Continue(()),
            Err(e) => {
                receiver.error = Some(e);
                false
            }
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn ignore(_base: *mut pg_sys::DestReceiver) {}
