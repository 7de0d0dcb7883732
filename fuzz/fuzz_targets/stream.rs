#![no_main]
//! What a server says at login, as answers to commands, and in the stream's frames.

#[path = "../common/mod.rs"]
#[allow(dead_code)] // each target uses its part of it
mod common;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    common::targets::stream(input);
});
