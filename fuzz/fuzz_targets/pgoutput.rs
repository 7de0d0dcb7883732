#![no_main]
//! Messages of pgoutput.

#[path = "../common/mod.rs"]
#[allow(dead_code)] // each target uses its part of it
mod common;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    common::targets::pgoutput(input);
});
