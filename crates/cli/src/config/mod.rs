//! The config file: TOML in, the same settings that flags give out. Every key is a row of [`keys::KEYS`]; what is not
//! there is an error that names the line and the nearest known key. Tables that have no flags are [`tables`].

pub(crate) mod keys;
pub(crate) mod tables;

use std::path::Path;

use bindery_hub::card::nearest;
use toml::de::{DeTable, DeValue};

use crate::{args::ServeArgs, failure::Failure};
use keys::{KEYS, Kind, TABLE_KEYS};

/// Bytes of a config file.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Sections that belong to the config file and come with later versions.
const LATER_SECTIONS: [&str; 6] = ["store", "local", "upstreams", "audit", "routes", "guardrails"];

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
    parse(&text).map_err(|problem| {
        let place = problem.line.map_or_else(|| format!("{shown}"), |line| format!("{shown}:{line}"));
        let failure = Failure::usage(format!("{place}: {}", problem.message));
        let hint = problem.hint.unwrap_or_else(|| "`bindery check --explain` documents every key".to_owned());
        failure.hint(hint).into()
    })
}

/// What is wrong with a file, and where.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    line: Option<usize>,
    message: String,
    hint: Option<String>,
}

/// The text of a config file in the form of flags.
pub(crate) fn parse(text: &str) -> Result<ServeArgs, Problem> {
    let line_of = |offset: usize| text.get(..offset).unwrap_or(text).matches('\n').count() + 1;
    let problem = |offset: usize, message: String| Problem { line: Some(line_of(offset)), message, hint: None };
    let document = DeTable::parse(text).map_err(|error| Problem {
        line: error.span().map(|span| line_of(span.start)),
        message: error.message().to_owned(),
        hint: Some("the file is not valid TOML there".to_owned()),
    })?;
    let mut settings = ServeArgs::default();
    for (section, value) in document.get_ref() {
        let name: &str = section.get_ref();
        let at = section.span().start;
        if LATER_SECTIONS.contains(&name) {
            return Err(Problem {
                hint: Some(format!("remove the section; this version knows {}", sections().join(", "))),
                ..problem(at, format!("[{name}] is not in this version yet"))
            });
        }
        refuse_secret(name).map_err(|failure| Problem { line: Some(line_of(at)), ..failure })?;
        if tables::is_table(name) {
            settings.tables.read(name, at, value.get_ref(), &line_of)?;
            continue;
        }
        if !KEYS.iter().any(|key| key.section == name) {
            return Err(problem(at, unknown("section", name, &sections())));
        }
        let DeValue::Table(table) = value.get_ref() else {
            return Err(problem(
                at,
                format!("`{name}` is a section: write [{name}] on a line of its own and its keys below"),
            ));
        };
        for (key, value) in table {
            let at = key.span().start;
            let name_of_key: &str = key.get_ref();
            refuse_secret(name_of_key).map_err(|failure| Problem { line: Some(line_of(at)), ..failure })?;
            let Some(known) = KEYS.iter().find(|known| known.section == name && known.name == name_of_key) else {
                let names: Vec<&str> =
                    KEYS.iter().filter(|known| known.section == name).map(|known| known.name).collect();
                let mut message = format!("in [{name}]: {}", unknown("key", name_of_key, &names));
                if let Some(other) = KEYS.iter().find(|known| known.name == name_of_key) {
                    message = format!("`{name_of_key}` belongs to [{}], not to [{name}]", other.section);
                }
                return Err(problem(at, message));
            };
            for text in texts_of(value.get_ref(), known.kind)
                .ok_or_else(|| problem(at, format!("{name}.{name_of_key} must be {}", known.kind.describe())))?
            {
                (known.set)(&mut settings, &text)
                    .map_err(|why| problem(at, format!("{name}.{name_of_key} = {text:?} cannot be used: {why}")))?;
            }
        }
    }
    settings.tables.check()?;
    Ok(settings)
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
    let mut sections: Vec<&str> = KEYS.iter().map(|key| key.section).chain(tables).collect();
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
        let problem = parse(text).unwrap_err();
        format!("{}: {}", problem.line.unwrap(), problem.message)
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
    fn keys_are_refused_and_later_sections_say_so() {
        let problem = parse("[server]\napi_key = \"s3cret\"").unwrap_err();
        assert!(!format!("{problem:?}").contains("s3cret"));
        assert_eq!(problem.hint.as_deref(), Some("put it into the environment as BINDERY_API_KEY"));
        for section in LATER_SECTIONS {
            for text in [format!("[{section}]\nx = 1"), format!("[[{section}]]\nx = 1")] {
                assert!(message(&text).contains("not in this version yet"), "{text}");
            }
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
