//! Physical standbys, and what happens to them.

use super::{Postgres, copy_folder, folder, free_port, spawn};
use std::io::Write as _;

impl Postgres {
    /// A hot standby of this server, which is stopped for a moment for it. It follows through the physical slot `standby` and may
    /// synchronize slots, if `settings`, more lines for its postgresql.conf, say so.
    pub async fn standby(&mut self, settings: &[&str]) -> Self {
        let make = "SELECT pg_create_physical_replication_slot('standby', true)";
        self.connect("postgres").await.batch_execute(make).await.expect("a physical slot");
        self.stop();
        let new = folder("sluice-pg", self.as_nobody);
        let data = new.path().join("data");
        copy_folder(&self.data(), &data);
        self.start_again();
        // Slots are no part of a backup (manual: "pg_basebackup").
        let _ = std::fs::remove_dir_all(data.join("pg_replslot/standby"));
        std::fs::write(data.join("standby.signal"), "").expect("a file");
        let port = free_port();
        let mut conf = std::fs::OpenOptions::new().append(true).open(data.join("postgresql.conf")).expect("postgresql.conf");
        let primary = format!("host=127.0.0.1 port={} user=postgres password=pw dbname=postgres", self.port);
        writeln!(conf, "port={port}\nprimary_conninfo='{primary}'\nprimary_slot_name='standby'").expect("settings");
        for setting in settings {
            writeln!(conf, "{setting}").expect("settings");
        }
        drop(conf);
        let process = spawn(self.as_nobody, &self.bin, new.path());
        let mut server = Self { folder: Some(new), process, port, major: self.major, bin: self.bin.clone(), as_nobody: self.as_nobody };
        server.wait_ready();
        server
    }

    /// Signal 9 to the postmaster; it stays away.
    pub fn kill_9(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Makes a standby the primary.
    pub async fn promote(&self) {
        let done: bool = self.connect("postgres").await.query_one("SELECT pg_promote()", &[]).await.expect("an answer").get(0);
        assert!(done, "it is promoted\n{}", self.log());
    }
}
