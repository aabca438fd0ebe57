//! Where the store lies: `sqlite://FILE` or `postgres://USER:PASSWORD@HOST/DATABASE`.
//!
//! Knows no schema and opens nothing but the file that is not there yet.
//!
//! **Invariant**: what it shows of itself, by `Display` and by `Debug`, holds no password.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use sqlx::{ConnectOptions as _, any::AnyConnectOptions};

use super::error::StoreError;

/// The kinds of database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// One file, one machine.
    Sqlite,
    /// A server that several nodes share.
    Postgres,
}

/// A checked URL.
#[derive(Clone)]
pub struct StoreUrl {
    kind: StoreKind,
    options: AnyConnectOptions,
    /// SQLite's file, whatever it is opened for.
    path: Option<PathBuf>,
    /// SQLite's file, where it may be created.
    file: Option<PathBuf>,
    shown: Arc<str>,
}

impl StoreUrl {
    /// Which database it names.
    pub fn kind(&self) -> StoreKind {
        self.kind
    }

    /// Whether anything was ever written there: false for a SQLite file that is missing or empty. A server that cannot be
    /// reached counts as there, and says so itself.
    pub fn is_there(&self) -> bool {
        self.path.as_ref().is_none_or(|path| std::fs::metadata(path).is_ok_and(|file| file.len() > 0))
    }

    /// Whether it can be looked into without making it or asking another machine: SQLite's file is there.
    pub fn is_file_here(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.is_file())
    }

    /// As it may be shown.
    pub(super) fn shown(&self) -> &Arc<str> {
        &self.shown
    }

    /// SQLite's `?mode=ro`.
    pub(super) fn is_read_only(&self) -> bool {
        self.kind == StoreKind::Sqlite && self.file.is_none()
    }

    /// SQLite's file, where it may be written.
    pub(super) fn writable_file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    pub(super) fn options(&self) -> &AnyConnectOptions {
        &self.options
    }

    /// Creates SQLite's file where there is none, so that nobody but its user ever reads it: it holds the digests of
    /// keys. (The two files beside it take its permissions.)
    pub(super) fn create_file(&self) -> Result<(), StoreError> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        match options.open(file) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                Err(StoreError::Full { store: Arc::clone(&self.shown), why: error.to_string() })
            }
            Err(error) => Err(StoreError::Unreachable { store: Arc::clone(&self.shown), why: error.to_string() }),
        }
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreUrl({})", self.shown)
    }
}

impl FromStr for StoreUrl {
    type Err = StoreError;

    fn from_str(url: &str) -> Result<Self, StoreError> {
        if let Some(rest) = url.strip_prefix("sqlite:") {
            return sqlite(url, rest.strip_prefix("//").unwrap_or(rest));
        }
        let shown = without_password(url);
        let bad = |why: String| StoreError::BadUrl { url: shown.clone(), why };
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(bad("it begins neither with sqlite:// nor with postgres://".to_owned()));
        }
        let options: AnyConnectOptions = url.parse().map_err(|_| bad("it is not a URL".to_owned()))?;
        if options.database_url.path().trim_matches('/').is_empty() {
            return Err(bad("it names no database; add /DATABASE".to_owned()));
        }
        // The driver's own reading, so that a wrong parameter is met here and not at the first connection.
        url.parse::<sqlx::postgres::PgConnectOptions>()
            .map_err(|_| bad("PostgreSQL's driver cannot read it".to_owned()))?;
        let options = options.disable_statement_logging();
        Ok(Self { kind: StoreKind::Postgres, options, path: None, file: None, shown: shown.into() })
    }
}

/// `path[?mode=ro]`. A store in memory is refused: each of its connections would be a store of its own.
fn sqlite(url: &str, rest: &str) -> Result<StoreUrl, StoreError> {
    let bad = |why: &str| StoreError::BadUrl { url: url.to_owned(), why: why.to_owned() };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mode = match query {
        "" | "mode=rw" | "mode=rwc" => "rwc",
        "mode=ro" => "ro",
        _ => return Err(bad("after the file's name only ?mode=ro is understood")),
    };
    if path.is_empty() || path == ":memory:" {
        return Err(bad("it names no file"));
    }
    if path.contains('#') {
        return Err(bad("a file's name with # in it is not understood"));
    }
    let file = std::path::absolute(path).map_err(|_| bad("its path cannot be made absolute"))?;
    // Resolved here where it exists: the URL's rules would drop `..` without looking at links.
    let file = match (file.parent().and_then(|folder| folder.canonicalize().ok()), file.file_name()) {
        (Some(folder), Some(name)) => folder.join(name),
        _ => file,
    };
    // A percent sign in a path is itself, and what looks like a host (sqlite://FILE) is a path.
    let escaped = file.to_str().ok_or_else(|| bad("its path is not UTF-8"))?.replace('%', "%25");
    let options: AnyConnectOptions =
        format!("sqlite://{escaped}?mode={mode}").parse().map_err(|_| bad("it is not a URL"))?;
    Ok(StoreUrl {
        kind: StoreKind::Sqlite,
        options: options.disable_statement_logging(),
        path: Some(file.clone()),
        file: (mode == "rwc").then_some(file),
        shown: url.into(),
    })
}

/// The URL with its password, and parameters that may hold one, hidden; also where it is no URL at all.
fn without_password(url: &str) -> String {
    let (main, query) = url.split_once('?').map_or((url, None), |(main, query)| (main, Some(query)));
    let (scheme, rest) = main.split_once("://").unwrap_or(("", main));
    // The last @: a password may hold one by mistake.
    let rest = match rest.rsplit_once('@') {
        Some((user, host)) => format!("{}:***@{host}", user.split(':').next().unwrap_or_default()),
        None => rest.to_owned(),
    };
    let query = query.map_or(String::new(), |query| {
        let hidden = query.split('&').map(|pair| match pair.split_once('=') {
            Some((name, _)) if name.to_ascii_lowercase().contains("password") => format!("{name}=***"),
            _ => pair.to_owned(),
        });
        format!("?{}", hidden.collect::<Vec<_>>().join("&"))
    });
    if scheme.is_empty() { format!("{rest}{query}") } else { format!("{scheme}://{rest}{query}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_never_shown() {
        for url in [
            "postgres://bindery:s3cret@db.example/bindery",
            "postgresql://bindery:s3cret@db.example:5432/bindery?sslmode=require",
            "postgres://db.example/bindery?user=bindery&password=s3cret",
            "postgres://bindery:s3c@s3cret@db.example/bindery",
            "mysql://bindery:s3cret@db.example/bindery",
            "postgres://bindery:s3cret@db.example",
            "postgres://bindery:s3cret@db.example/b?port=s3cret&password=s3cret",
        ] {
            let shown = match url.parse::<StoreUrl>() {
                Ok(url) => format!("{url} {url:?}"),
                Err(error) => format!("{error} {error:?} {}", error.hint()),
            };
            assert!(shown.contains("***") && !shown.replace("port=s3cret", "").contains("s3cret"), "{shown}");
        }
    }

    #[test]
    fn every_url_is_a_kind_or_refused_by_name() {
        for (url, kind) in [
            ("sqlite://bindery.db", StoreKind::Sqlite),
            ("sqlite:///var/lib/bindery/b.db", StoreKind::Sqlite),
            ("sqlite:bindery.db?mode=ro", StoreKind::Sqlite),
            ("sqlite://My Store 50%.db", StoreKind::Sqlite),
            ("postgres://u@h/d", StoreKind::Postgres),
        ] {
            let parsed: StoreUrl = url.parse().unwrap();
            assert_eq!(parsed.kind(), kind, "{url}");
        }
        for bad in [
            "",
            "bindery.db",
            "sqlite://",
            "sqlite://:memory:",
            "sqlite://a?cache=shared",
            "postgres://h",
            "mysql://h/d",
        ] {
            assert!(matches!(bad.parse::<StoreUrl>(), Err(StoreError::BadUrl { .. })), "{bad}");
        }
    }
}
