//! Sessions, TLS, the replication client and the log against real servers of all tested majors.

#[path = "../support/mod.rs"]
mod support;

mod early;
mod follow;
mod sessions;
mod slots;
mod stream;
mod streamed;
mod streamed_worker;
mod tls;
#[path = "../support/worker.rs"]
mod worker;

/// One test per major.
macro_rules! on_all_majors {
    ($($check:path as $name:ident),* $(,)?) => {
        $(mod $name {
            #[tokio::test]
            async fn on_14() { $check(14).await; }
            #[tokio::test]
            async fn on_15() { $check(15).await; }
            #[tokio::test]
            async fn on_17() { $check(17).await; }
        })*
        /// The macro knows all of them.
        #[test]
        fn majors_are_all_tested() {
            assert_eq!(crate::support::MAJORS, [14, 15, 17]);
        }
    };
}

on_all_majors!(
    crate::sessions::sessions_and_slots as sessions_and_slots,
    crate::tls::modes as tls_modes,
    crate::stream::stream as log,
    crate::streamed::streamed as streamed_log,
    crate::streamed_worker::killed as streamed_to_a_worker,
    crate::early::early as before_the_end,
);
