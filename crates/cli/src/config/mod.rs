//! The config file: TOML in, the same settings that flags give out, or every mistake in it.
//!
//! Keys that have flags are rows of [`keys::KEYS`], tables of adapters are [`tables`]; the sections of the gateway are
//! read by the gateway itself, and [`gateway_keys`] documents them. Invariant: what nobody reads is an error that names
//! the line and the nearest known key.

pub(crate) mod gateway_keys;
pub(crate) mod keys;
pub(crate) mod tables;

use std::{fmt, path::Path, sync::Arc};

use bindery_gateway::config::{GatewayConfig, Problem, SECTIONS};
use bindery_hub::card::nearest;
use toml::de::{DeTable, DeValue};

use crate::{args::ServeArgs, failure::Failure};
use keys::{KEYS, Kind, TABLE_KEYS};

/// Bytes of a config file.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// All that is wrong with a file, in the order of its lines.
#[derive(Debug)]
pub(crate) struct Problems {
    file: String,
    problems: Vec<Problem>,
}

impl Problems {
    /// What is wrong, with its place, and the next step.
    pub(crate) fn each(&self) -> impl Iterator<Item = (String, &str)> {
        self.problems.iter().map(|problem| {
            let Problem { line, message, hint } = problem;
            let place = line.map_or_else(|| self.file.clone(), |line| format!("{}:{line}", self.file));
            (format!("{place}: {message}"), hint.as_deref().unwrap_or("`bindery check --explain` documents every key"))
        })
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.each().map(|(message, _)| message).collect::<Vec<_>>().join("; "))
    }
}

impl std::error::Error for Problems {}

/// Reads a config file into the form of flags.
pub(crate) fn read(path: &Path) -> anyhow::Result<ServeArgs> {
    let shown = path.display();
    let fail = |error: std::io::Error| {
        Failure::usage(format!("cannot read the config file {shown}: {error}")).hint("check the path")
    };
    let size = std::fs::metadata(path).map_err(fail)?.len();
    if size > MAX_CONFIG_BYTES {
        return Err(Failure::usage(format!(
            "the config file {shown} has {size} bytes, the limit is {MAX_CONFIG_BYTES}"
        ))
        .into());
    }
    let text = String::from_utf8(std::fs::read(path).map_err(fail)?).map_err(|error| {
        let (at, bytes) = (error.utf8_error().valid_up_to(), error.as_bytes());
        let line = bytes[..at].split(|&byte| byte == b'\n').count();
        Failure::usage(format!(
            "{shown}:{line}: the config file is not UTF-8: byte {:#04x} begins no character",
            bytes[at]
        ))
        .hint("save it as UTF-8, the encoding of TOML")
    })?;
    parse(&text).map_err(|problems| Problems { file: shown.to_string(), problems }.into())
}

/// Where in the text a place is, from line 1.
fn line_of(text: &str, offset: usize) -> usize {
    text.get(..offset).unwrap_or(text).matches('\n').count() + 1
}

/// The text of a config file in the form of flags.
pub(crate) fn parse(text: &str) -> Result<ServeArgs, Vec<Problem>> {
    let line_of = |offset: usize| line_of(text, offset);
    let document = DeTable::parse(text).map_err(|error| {
        vec![Problem {
            line: error.span().map(|span| line_of(span.start)),
            message: error.message().to_owned(),
            hint: Some("the file is not valid TOML there".to_owned()),
        }]
    })?;
    let (settings, problems) = (ServeArgs::default(), Vec::new());
    let mut reader = Reader { line_of: &line_of, settings, problems, num_wrong_headers: 0 };
    for (section, value) in document.get_ref() {
        let read = reader.section(section.get_ref(), section.span().start, value.get_ref());
        reader.note(read);
    }
    let Reader { mut settings, mut problems, num_wrong_headers, .. } = reader;
    settings.tables.tenants = tables::tenant_lines(document.get_ref(), &line_of);
    problems.extend(settings.tables.strangers());
    // Its reader would get no further than to such a header, and say less of it.
    if num_wrong_headers == 0 {
        match GatewayConfig::parse(text) {
            Ok(gateway) => settings.tables.gateway = Some(Arc::new(gateway)),
            Err(more) => problems.extend(more),
        }
    }
    // Stable: what is in one line stays in the order in which it was found.
    problems.sort_by_key(|problem| problem.line);
    if problems.is_empty() { Ok(settings) } else { Err(problems) }
}

/// Goes through a document and keeps what it finds, right or wrong.
struct Reader<'a> {
    line_of: &'a dyn Fn(usize) -> usize,
    settings: ServeArgs,
    problems: Vec<Problem>,
    /// Of the gateway's sections.
    num_wrong_headers: usize,
}

impl Reader<'_> {
    fn note(&mut self, read: Result<(), Problem>) {
        self.problems.extend(read.err());
    }

    fn problem(&self, offset: usize, message: String) -> Problem {
        Problem { line: Some((self.line_of)(offset)), message, hint: None }
    }

    fn refuse_secret(&self, name: &str, at: usize) -> Result<(), Problem> {
        refuse_secret(name).map_err(|problem| Problem { line: Some((self.line_of)(at)), ..problem })
    }

    fn section(&mut self, name: &str, at: usize, value: &DeValue<'_>) -> Result<(), Problem> {
        self.refuse_secret(name, at)?;
        if SECTIONS.contains(&name) {
            return self.gateway_header(name, at, value);
        }
        if tables::is_table(name) {
            let problems = self.settings.tables.read(name, at, value, self.line_of);
            self.problems.extend(problems);
            return Ok(());
        }
        if !KEYS.iter().any(|key| key.section == name) {
            return Err(self.problem(at, unknown("section", name, &sections())));
        }
        let DeValue::Table(table) = value else {
            let message = format!("`{name}` is a section: write [{name}] on a line of its own and its keys below");
            return Err(self.problem(at, message));
        };
        for (key, value) in table {
            let read = self.key(name, (key.get_ref(), key.span().start), value.get_ref());
            self.note(read);
        }
        Ok(())
    }

    /// The gateway reads its sections itself; of a header in the wrong form its reader knows types alone.
    fn gateway_header(&mut self, name: &str, at: usize, value: &DeValue<'_>) -> Result<(), Problem> {
        let header = gateway_keys::header_of(name);
        let is_right = match value {
            DeValue::Table(_) => !header.starts_with("[["),
            DeValue::Array(_) => header.starts_with("[["),
            _ => false,
        };
        if is_right {
            return Ok(());
        }
        self.num_wrong_headers += 1;
        Err(self.problem(at, format!("write the header of `{name}` as {header}, and its keys below")))
    }

    fn key(&mut self, section: &str, (name, at): (&str, usize), value: &DeValue<'_>) -> Result<(), Problem> {
        self.refuse_secret(name, at)?;
        let Some(known) = KEYS.iter().find(|known| known.section == section && known.name == name) else {
            let names: Vec<&str> =
                KEYS.iter().filter(|known| known.section == section).map(|known| known.name).collect();
            let mut message = format!("in [{section}]: {}", unknown("key", name, &names));
            if let Some(other) = KEYS.iter().find(|known| known.name == name) {
                message = format!("`{name}` belongs to [{}], not to [{section}]", other.section);
            }
            return Err(self.problem(at, message));
        };
        let Some(texts) = texts_of(value, known.kind) else {
            return Err(self.problem(at, format!("{section}.{name} must be {}", known.kind.describe())));
        };
        for text in texts {
            (known.set)(&mut self.settings, &text)
                .map_err(|why| self.problem(at, format!("{section}.{name} = {text:?} cannot be used: {why}")))?;
        }
        Ok(())
    }
}

/// Keys in a file end up in backups and repositories.
fn refuse_secret(key: &str) -> Result<(), Problem> {
    if !matches!(key, "api_key" | "api_keys" | "admin_key" | "api-key" | "admin-key") {
        return Ok(());
    }
    let variable = if key.starts_with("admin") { "BINDERY_ADMIN_KEY" } else { "BINDERY_API_KEY" };
    Err(Problem {
        line: None,
        message: format!("`{key}`: a key itself is refused in a config file"),
        hint: Some(format!("put it into the environment as {variable}")),
    })
}

fn sections() -> Vec<&'static str> {
    let tables = TABLE_KEYS.iter().map(|key| key.header.trim_matches(['[', ']']));
    let mut sections: Vec<&str> = KEYS.iter().map(|key| key.section).chain(tables).chain(SECTIONS).collect();
    sections.dedup();
    sections
}

fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    match nearest(name, known.iter().copied()).first() {
        Some(near) => format!("unknown {what} `{name}`; did you mean `{near}`?"),
        None => format!("unknown {what} `{name}`; known: {}", known.join(", ")),
    }
}

/// The value in the words a flag would be given; None where its type is wrong.
fn texts_of(value: &DeValue<'_>, kind: Kind) -> Option<Vec<String>> {
    match (value, kind) {
        (DeValue::String(text), Kind::Text | Kind::Texts) => Some(vec![text.to_string()]),
        (DeValue::Array(items), Kind::Texts) => items
            .iter()
            .map(|item| match item.get_ref() {
                DeValue::String(text) => Some(text.to_string()),
                _ => None,
            })
            .collect(),
        (DeValue::Integer(number), Kind::Integer) if number.radix() == 10 => Some(vec![number.as_str().to_owned()]),
        (DeValue::Boolean(value), Kind::Boolean) => Some(vec![value.to_string()]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        let problems = parse(text).unwrap_err();
        format!("{}: {}", problems[0].line.unwrap(), problems[0].message)
    }

    #[test]
    fn sections_and_keys_reach_their_settings() {
        let settings = parse(
            "[server]\nhost = \"0.0.0.0\"\nport = 9000\nserved_model_name = [\"a\", \"b\"]\nshutdown_timeout = \"5s\"\n\
             [model]\nsource = \"org/repo\"\nquantize = \"int4\"\nthreads = 3\nkv_cache_memory = \"1GiB\"\noffline = true\n",
        )
        .unwrap();
        assert_eq!(settings.server.host.as_deref(), Some("0.0.0.0"));
        assert_eq!(settings.server.port, Some(9000));
        assert_eq!(settings.server.served_model_name, ["a", "b"]);
        assert_eq!(settings.server.shutdown_timeout, Some(std::time::Duration::from_secs(5)));
        assert_eq!(settings.model.as_deref(), Some("org/repo"));
        assert_eq!(settings.engine.load.quantize, Some(crate::args::QuantizeArg::Int4));
        assert_eq!(settings.engine.load.threads, Some(3));
        assert_eq!(settings.engine.kv_cache_memory.map(|size| size.as_u64()), Some(1 << 30));
        assert_eq!(settings.engine.offline, Some(true));
    }

    #[test]
    fn what_is_not_known_is_named_with_its_line_and_the_nearest_key() {
        assert_eq!(message("[server]\nprot = 1"), "2: in [server]: unknown key `prot`; did you mean `port`?");
        assert_eq!(message("[sever]\nport = 1"), "1: unknown section `sever`; did you mean `server`?");
        assert_eq!(message("[server]\n\nquantize = \"int4\""), "3: `quantize` belongs to [model], not to [server]");
        assert_eq!(
            message("server = 3"),
            "1: `server` is a section: write [server] on a line of its own and its keys below"
        );
        assert!(message("[model]\nzzz = 1").contains("known: source"));
    }

    #[test]
    fn values_of_the_wrong_type_or_range_are_refused() {
        assert_eq!(message("[server]\nport = \"8000\""), "2: server.port must be a whole number");
        assert!(message("[server]\nport = 70000").starts_with("2: server.port = \"70000\" cannot be used"));
        assert!(message("[model]\nthreads = 0").contains("cannot be used"));
        assert!(message("[model]\ndtype = \"f64\"").contains("auto, f32, bf16, f16"));
        assert!(message("[model]\ndevice = \"cuda\"").contains("not in this version yet"));
        assert!(message("[model]\noffline = \"yes\"").contains("must be true or false"));
        assert!(message("[server]\nport = 1\nport = 2").starts_with("3: "), "duplicate keys");
        assert!(message("[server\n").starts_with("1: "));
    }

    #[test]
    fn keys_are_refused_and_not_repeated() {
        let problems = parse("[server]\napi_key = \"s3cret\"").unwrap_err();
        assert!(!format!("{problems:?}").contains("s3cret"));
        assert_eq!(problems[0].hint.as_deref(), Some("put it into the environment as BINDERY_API_KEY"));
    }

    #[test]
    fn every_mistake_is_told_in_the_order_of_lines_whoever_reads_the_section() {
        let text = "[server]\nprot = 1\nport = \"x\"\n[[tenants]]\nname = \"a\"\nprivacy = \"open\"\n\
                    [[adapters]]\nname = \"b\"\nsource = \"x/y\"\ntenants = [\"z\"]\n[sever]\nx = 1\n";
        let lines: Vec<Option<usize>> = parse(text).unwrap_err().iter().map(|problem| problem.line).collect();
        assert_eq!(lines, [2, 3, 6, 7, 11].map(Some));
    }

    #[test]
    fn headers_of_the_gateways_sections_are_told_in_the_words_of_the_file() {
        assert_eq!(message("[[store]]\nurl = \"x\""), "1: write the header of `store` as [store], and its keys below");
        assert_eq!(message("tenants = 3"), "1: write the header of `tenants` as [[tenants]], and its keys below");
        for section in SECTIONS {
            assert!(gateway_keys::header_of(section).contains(section), "{section} is documented");
        }
    }

    #[test]
    fn every_key_can_be_set_to_its_example_and_read_back() {
        for key in KEYS {
            let mut settings = ServeArgs::default();
            assert_eq!((key.get)(&settings), None, "{}.{}", key.section, key.name);
            (key.set)(&mut settings, key.example).unwrap();
            assert_eq!((key.get)(&settings).as_deref(), Some(key.example), "{}.{}", key.section, key.name);
            let value = match key.kind {
                Kind::Text | Kind::Texts => format!("{:?}", key.example),
                Kind::Integer | Kind::Boolean => key.example.to_owned(),
            };
            let parsed = parse(&format!("[{}]\n{} = {value}", key.section, key.name)).unwrap();
            assert_eq!((key.get)(&parsed).as_deref(), Some(key.example));
        }
    }
}
