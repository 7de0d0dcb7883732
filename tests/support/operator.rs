//! Settings of an operator in a test.

use clap::{Args as _, FromArgMatches as _};
use sluice::operator::Options;

/// What the flags' defaults and `flags` give to an operator that lives in `home`, with a port, an image and a pace for tests.
pub fn options_with<'a>(home: &'a str, flags: impl IntoIterator<Item = &'a str>) -> Options {
    let own =
        ["operator", "--listen=127.0.0.1:0", "--namespace", home, "--pod-name=operator", "--leader-election=false", "--concurrency=4"];
    let worker = ["--worker-image=sluice:1", "--worker-image-pull-policy=Never"];
    let command = Options::augment_args(clap::Command::new("operator").args_override_self(true));
    let matches = command.try_get_matches_from(own.into_iter().chain(worker).chain(flags)).expect("flags that the operator knows");
    Options::from_arg_matches(&matches).expect("valid flags")
}

/// The same, serving one namespace.
pub fn options(home: &str, namespace: &str) -> Options {
    options_with(home, ["--watch-namespaces", namespace])
}
