//! User names, passwords and certificates: files mounted from Secrets, read again when they change.

use super::contract::{Desired, EndpointSpec};
use crate::connectors::postgres::endpoint::Secret;
use crate::engine::error::{Error, Result, reason};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// Limit of one file: that of a whole Secret.
const FILE_LIMIT: u64 = 1024 * 1024;
/// Passwords that are remembered in order to hide them: enough for a few rotations.
const REMEMBERED: usize = 16;
/// Limit of a message in the status document, in bytes.
pub const MESSAGE_LIMIT: usize = 1024;

/// How Sluice logs in to one database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// User name.
    pub username: String,
    /// Password.
    pub password: Secret,
    /// CA bundle (PEM).
    pub ca: Option<String>,
    /// Client certificate and key (PEM).
    pub client_certificate: Option<(String, Secret)>,
}

/// The logins of a Mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Of the source.
    pub source: Login,
    /// Of the target.
    pub target: Login,
}

impl Credentials {
    /// Reads the files that a document names.
    ///
    /// # Errors
    /// Class `Stop`, reason `InvalidSpec`: a file is missing or unreadable. No content is in the message.
    pub fn read(desired: &Desired) -> Result<Self> {
        Ok(Self {
            source: read_login(&desired.source).map_err(|error| error.context("source"))?,
            target: read_login(&desired.target).map_err(|error| error.context("target"))?,
        })
    }
}

fn read_login(endpoint: &EndpointSpec) -> Result<Login> {
    let folder = Path::new(&endpoint.folder);
    let credential = |name: &str| read(&folder.join("credentials").join(name)).map(|text| without_newline(&text).to_owned());
    let ca = endpoint.ca_key.as_ref().map(|key| read(&folder.join("ca").join(key)));
    let client_certificate = endpoint.client_certificate.then(|| {
        let client = folder.join("client");
        Ok((read(&client.join("tls.crt"))?, Secret(read(&client.join("tls.key"))?)))
    });
    Ok(Login {
        username: credential("username")?,
        password: Secret(credential("password")?),
        ca: ca.transpose()?,
        client_certificate: client_certificate.transpose()?,
    })
}

/// A user name or password without the newline that editors and `echo` put at a file's end.
#[must_use]
pub fn without_newline(text: &str) -> &str {
    let text = text.strip_suffix('\n').unwrap_or(text);
    text.strip_suffix('\r').unwrap_or(text)
}

fn read(path: &Path) -> Result<String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(FILE_LIMIT + 1).read_to_string(&mut text));
    let failed = |why: String| Error::stop(reason::INVALID_SPEC, format!("{}: {why}", path.display()));
    match read {
        Ok(size) if size as u64 > FILE_LIMIT => Err(failed(format!("larger than {FILE_LIMIT} bytes"))),
        Ok(_) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(failed("missing; does the Secret have this key?".to_owned())),
        Err(error) => Err(failed(error.to_string())),
    }
}

/// Takes passwords out of texts that leave the process. Old ones stay hidden after a rotation.
#[derive(Debug, Default)]
pub struct Redactor {
    secrets: VecDeque<Secret>,
}

impl Redactor {
    /// Hides these passwords from now on.
    pub fn learn(&mut self, credentials: &Credentials) {
        for password in [&credentials.source.password, &credentials.target.password] {
            if !password.0.is_empty() && !self.secrets.contains(password) {
                self.secrets.push_back(password.clone());
            }
        }
        while self.secrets.len() > REMEMBERED {
            self.secrets.pop_front();
        }
    }

    /// The text with `***` for each password, cut to [`MESSAGE_LIMIT`] bytes.
    #[must_use]
    pub fn clean(&self, text: &str) -> String {
        let mut passwords: Vec<&str> = self.secrets.iter().map(|secret| secret.0.as_str()).collect();
        // One may be a part of another: the longer is taken out first.
        passwords.sort_by_key(|password| std::cmp::Reverse(password.len()));
        let clean = passwords.into_iter().fold(text.to_owned(), |text, password| text.replace(password, "***"));
        cut(clean)
    }
}

fn cut(mut text: String) -> String {
    const MARK: &str = "…";
    if text.len() > MESSAGE_LIMIT {
        text.truncate(text.floor_char_boundary(MESSAGE_LIMIT - MARK.len()));
        text.push_str(MARK);
    }
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::worker::contract::tests::desired;
    use std::fs;

    /// Logins with these passwords.
    pub(crate) fn credentials(source: &str, target: &str) -> Credentials {
        let login = |password: &str| Login {
            username: "sluice".to_owned(),
            password: Secret(password.to_owned()),
            ca: None,
            client_certificate: None,
        };
        Credentials { source: login(source), target: login(target) }
    }

    fn write(folder: &Path, name: &str, text: &str) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn files_are_read_by_the_document() {
        let folder = tempfile::tempdir().unwrap();
        let mut desired = desired(1);
        for endpoint in [&mut desired.source, &mut desired.target] {
            endpoint.folder = folder.path().join(&endpoint.host).display().to_string();
            let folder = Path::new(&endpoint.folder);
            write(folder, "credentials/username", "sluice\n");
            write(folder, "credentials/password", " p w \r\n");
        }
        let read = Credentials::read(&desired).unwrap();
        assert_eq!(read, credentials(" p w ", " p w "));
        assert!(!format!("{read:?}").contains("p w"));

        desired.target.ca_key = Some("ca.crt".to_owned());
        desired.target.client_certificate = true;
        let error = Credentials::read(&desired).unwrap_err();
        assert_eq!(error.reason, reason::INVALID_SPEC);
        assert!(error.message.starts_with("target: ") && error.message.contains("ca/ca.crt: missing"), "{error}");
        for (name, text) in [("ca/ca.crt", "CA\n"), ("client/tls.crt", "CERT\n"), ("client/tls.key", "KEY\n")] {
            write(Path::new(&desired.target.folder), name, text);
        }
        let login = Credentials::read(&desired).unwrap().target;
        assert_eq!(login.ca.as_deref(), Some("CA\n"));
        assert_eq!(login.client_certificate, Some(("CERT\n".to_owned(), Secret("KEY\n".to_owned()))));
    }

    #[test]
    fn passwords_are_taken_out() {
        let mut redactor = Redactor::default();
        redactor.learn(&credentials("secret", "secret-longer"));
        redactor.learn(&credentials("", "rotated"));
        assert_eq!(redactor.clean("secret, secret-longer and rotated: refused"), "***, *** and ***: refused");
        (0..50).for_each(|n| redactor.learn(&credentials(&format!("password {n}"), "")));
        assert_eq!(redactor.secrets.len(), REMEMBERED);
    }

    #[test]
    fn messages_are_bounded() {
        let clean = Redactor::default().clean(&"ä".repeat(MESSAGE_LIMIT));
        assert!(clean.len() <= MESSAGE_LIMIT && clean.ends_with("ä…"));
        assert_eq!(Redactor::default().clean("short"), "short");
    }
}
