//! `bindery check --explain`: every key of the config file in a text that could be one.
//!
//! It formats the tables of keys and knows no key itself. Invariant: each key is told with its meaning, form and default.

use std::fmt::Write as _;

use crate::config::{
    gateway_keys::GATEWAY_KEYS,
    keys::{KEYS, Kind, TABLE_KEYS},
};

/// A comment a key, under the headers that they belong to.
pub(super) fn explain() -> String {
    let mut text = String::from(
        "# Every key of the config file, with its default. Flags win over the environment, the environment over the file.\n\
         # Keys for clients never stand here: BINDERY_API_KEY (several: comma-separated) and BINDERY_ADMIN_KEY hold them,\n\
         # and variables of your choice those of tenants.\n",
    );
    let mut section = "";
    for key in KEYS {
        if key.section != section {
            section = key.section;
            let _ = writeln!(text, "\n[{section}]");
        }
        let example = match key.kind {
            Kind::Text | Kind::Texts => format!("{:?}", key.example),
            Kind::Integer | Kind::Boolean => key.example.to_owned(),
        };
        let _ = writeln!(text, "# {}: {}; for example {} = {example}", key.name, key.explain, key.name);
        let _ = writeln!(
            text,
            "#   {}; default: {}; flag: {}; environment: {}",
            key.kind.describe(),
            key.default,
            key.flag(),
            key.variable()
        );
    }
    let mut header = "";
    for key in TABLE_KEYS {
        if key.header != header {
            header = key.header;
            let _ = writeln!(text, "\n{header}");
        }
        let _ = writeln!(text, "# {}: {}; for example {} = {}", key.name, key.explain, key.name, key.example);
        let _ = writeln!(text, "#   {}; default: {}", key.kind.describe(), key.default);
    }
    for key in GATEWAY_KEYS {
        if key.header != header {
            header = key.header;
            let _ = writeln!(text, "\n{header}");
        }
        // A key within a table is not written with its dots on the left of an equals sign of its own.
        let short = key.name.rsplit('.').next().unwrap_or(key.name);
        let _ = writeln!(text, "# {}: {}; for example {short} = {}", key.name, key.explain, key.example);
        let _ = writeln!(text, "#   {}; default: {}", key.form.describe(), key.default);
    }
    text
}
