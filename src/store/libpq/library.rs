//! The linked libpq itself: the options it knows, and its own `PQsendQuery`.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use pq_sys::PGconn;

use super::result::text;

/// The connection options that a foreign server or a user mapping can carry for libpq: as postgres_fdw has
/// them, neither the debugging ones nor those that the wrapper itself sets.
pub fn known_keywords() -> Vec<String> {
    let mut keywords = Vec::new();
    // SAFETY: the array ends with an entry without a keyword and is ours until it is freed.
    unsafe {
        let defaults = pq_sys::PQconndefaults();
        let mut option = defaults;
        while !option.is_null() && !(*option).keyword.is_null() {
            let debug = text((*option).dispchar).is_some_and(|c| c.contains('D'));
            let keyword = text((*option).keyword).unwrap_or_default();
            if !debug && keyword != "client_encoding" && keyword != "fallback_application_name" {
                keywords.push(keyword);
            }
            option = option.add(1);
        }
        pq_sys::PQconninfoFree(defaults);
    }
    keywords
}

/// The type of libpq's `PQsendQuery`.
pub type SendQuery = unsafe extern "C-unwind" fn(*mut PGconn, *const c_char) -> c_int;

/// `PQsendQuery` of the very library that our connections call.
///
/// The name alone would lead to the function of `isolation.rs`, and from there to postgres_fdw's libpq, which
/// need not be ours.
pub fn own_send_query() -> SendQuery {
    static FOUND: OnceLock<SendQuery> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // SAFETY: the address is that of a function of libpq, whose library stays loaded because we link it; the
        // symbol found in it has the declared type.
        unsafe {
            let mut info: libc::Dl_info = std::mem::zeroed();
            libc::dladdr(pq_sys::PQconnectPoll as *const c_void, &mut info);
            let library = libc::dlopen(info.dli_fname, libc::RTLD_NOLOAD | libc::RTLD_LAZY);
            let function = libc::dlsym(library, c"PQsendQuery".as_ptr());
            assert!(!library.is_null() && !function.is_null(), "a loaded libpq has PQsendQuery");
            std::mem::transmute::<*mut c_void, SendQuery>(function)
        }
    })
}
