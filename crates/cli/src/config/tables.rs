//! The tables of the config file that have no flags: adapters, their folder, and the tenants they belong to.
//!
//! What can be said by the file alone is said here, with its line; what takes the environment or the disk is
//! [`crate::adapters`]'. Invariant: names in here are valid and unique, and every tenant that is named is there.

use bindery_engine::adapters::check_name;
use bindery_hub::card::nearest;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Problem,
    keys::{Kind, TABLE_KEYS},
    texts_of, unknown,
};

/// Keys of the contract's `[[tenants]]` that come with later versions.
const LATER_TENANT_KEYS: [&str; 7] = ["privacy", "models", "weight", "limits", "budget", "guardrails", "overflow"];

/// What the file says in tables.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileTables {
    pub(crate) adapters: Vec<AdapterTable>,
    pub(crate) folder: Option<FolderTable>,
    pub(crate) tenants: Vec<TenantTable>,
}

/// `[[adapters]]`
#[derive(Clone, Debug)]
pub(crate) struct AdapterTable {
    pub(crate) line: usize,
    pub(crate) name: String,
    pub(crate) source: String,
    pub(crate) tenants: Option<Vec<String>>,
    pub(crate) pinned: bool,
}

/// `[adapter_dir]`
#[derive(Clone, Debug)]
pub(crate) struct FolderTable {
    pub(crate) line: usize,
    pub(crate) path: String,
    pub(crate) watch: bool,
}

/// `[[tenants]]`
#[derive(Clone, Debug)]
pub(crate) struct TenantTable {
    pub(crate) line: usize,
    pub(crate) name: String,
    pub(crate) api_key_env: String,
}

/// Whether a section is one of these tables.
pub(super) fn is_table(name: &str) -> bool {
    header_of(name).is_some()
}

fn header_of(name: &str) -> Option<&'static str> {
    TABLE_KEYS.iter().map(|key| key.header).find(|header| header.trim_matches(['[', ']']) == name)
}

impl FileTables {
    /// Takes in one section of the file.
    pub(super) fn read(
        &mut self,
        name: &str,
        at: usize,
        value: &DeValue<'_>,
        line_of: &dyn Fn(usize) -> usize,
    ) -> Result<(), Problem> {
        let header = header_of(name).unwrap_or_default();
        let problem = |at: usize, message: String| Problem { line: Some(line_of(at)), message, hint: None };
        let tables: Vec<(usize, &DeTable<'_>)> = match (value, header.starts_with("[[")) {
            (DeValue::Table(table), false) => vec![(at, table)],
            (DeValue::Array(items), true) => {
                let table_of = |item: &Spanned<DeValue<'_>>| item.span().start;
                items
                    .iter()
                    .map(|item| match item.get_ref() {
                        DeValue::Table(table) => Ok((table_of(item), table)),
                        _ => Err(problem(
                            table_of(item),
                            format!("{header} is a table: write its header, and its keys below"),
                        )),
                    })
                    .collect::<Result<_, _>>()?
            }
            _ => return Err(problem(at, format!("write the header of `{name}` as {header}, and its keys below"))),
        };
        for (at, table) in tables {
            let fields = Fields { header, table, at, line_of };
            fields.check_keys()?;
            match name {
                "adapters" => self.add_adapter(&fields)?,
                "adapter_dir" => {
                    let watch = fields.flag("watch").unwrap_or(true);
                    self.folder = Some(FolderTable { line: fields.line(), path: fields.required("path")?, watch });
                }
                _ => self.add_tenant(&fields)?,
            }
        }
        Ok(())
    }

    fn add_adapter(&mut self, fields: &Fields<'_>) -> Result<(), Problem> {
        let name = fields.required("name")?;
        check_name(&name).map_err(|error| fields.problem("name", error.to_string()))?;
        if let Some(other) = self.adapters.iter().find(|other| other.name == name) {
            let message =
                format!("the adapter {name:?} is in line {} already: give each a name of its own", other.line);
            return Err(fields.problem("name", message));
        }
        let tenants = fields.texts("tenants");
        if tenants.as_ref().is_some_and(Vec::is_empty) {
            let message = format!("the adapter {name:?} has an empty list of tenants, so that nobody could use it");
            return Err(Problem {
                hint: Some("name tenants, or leave the key out: then everyone may".to_owned()),
                ..fields.problem("tenants", message)
            });
        }
        let pinned = fields.flag("pinned").unwrap_or(false);
        let line = fields.line();
        self.adapters.push(AdapterTable { line, name, source: fields.required("source")?, tenants, pinned });
        Ok(())
    }

    fn add_tenant(&mut self, fields: &Fields<'_>) -> Result<(), Problem> {
        let name = fields.required("name")?;
        if let Some(other) = self.tenants.iter().find(|other| other.name == name) {
            let message = format!("the tenant {name:?} is in line {} already: give each a name of its own", other.line);
            return Err(fields.problem("name", message));
        }
        let api_key_env = fields.required("api_key_env")?;
        let is_variable = |text: &str| {
            text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
                && !text.starts_with(|first: char| first.is_ascii_digit())
        };
        if !is_variable(&api_key_env) {
            // What stands there may be the key itself, so it is not repeated.
            return Err(Problem {
                hint: Some(
                    "put the key into the environment, and the variable's name here, like ACME_API_KEY".to_owned(),
                ),
                ..fields.problem("api_key_env", "api_key_env is no name of an environment variable".to_owned())
            });
        }
        self.tenants.push(TenantTable { line: fields.line(), name, api_key_env });
        Ok(())
    }

    /// After the whole file is read: tenants may stand below the adapters that name them.
    pub(super) fn check(&self) -> Result<(), Problem> {
        let known: Vec<&str> = self.tenants.iter().map(|tenant| tenant.name.as_str()).collect();
        for adapter in &self.adapters {
            let stranger = adapter.tenants.iter().flatten().find(|tenant| !known.contains(&tenant.as_str()));
            let Some(stranger) = stranger else { continue };
            let near = nearest(stranger, known.iter().copied()).first().map(|near| format!("; did you mean {near:?}?"));
            return Err(Problem {
                line: Some(adapter.line),
                message: format!(
                    "the adapter {:?} is for the tenant {stranger:?}, which is not there{}",
                    adapter.name,
                    near.unwrap_or_default()
                ),
                hint: Some(format!("add a [[tenants]] with name = {stranger:?}, or correct the name")),
            });
        }
        Ok(())
    }
}

/// One table, with where it stands.
struct Fields<'a> {
    header: &'static str,
    table: &'a DeTable<'a>,
    at: usize,
    line_of: &'a dyn Fn(usize) -> usize,
}

impl Fields<'_> {
    fn line(&self) -> usize {
        (self.line_of)(self.at)
    }

    /// About a key, in its line; about the table where it has no such key.
    fn problem(&self, key: &str, message: String) -> Problem {
        let of_key = self.table.iter().find(|(name, _)| name.get_ref() == key);
        let at = of_key.map_or(self.at, |(name, _)| name.span().start);
        Problem { line: Some((self.line_of)(at)), message, hint: None }
    }

    fn check_keys(&self) -> Result<(), Problem> {
        let known = || TABLE_KEYS.iter().filter(|key| key.header == self.header);
        for (key, value) in self.table {
            let name: &str = key.get_ref();
            if self.header == "[[tenants]]" && LATER_TENANT_KEYS.contains(&name) {
                return Err(Problem {
                    hint: Some("remove the key; this version knows name and api_key_env of a tenant".to_owned()),
                    ..self.problem(name, format!("in [[tenants]]: `{name}` is not in this version yet"))
                });
            }
            if matches!(name, "api_key" | "api_keys" | "key" | "keys") {
                return Err(Problem {
                    hint: Some("put it into the environment, and the variable's name here as api_key_env".to_owned()),
                    ..self.problem(name, format!("`{name}`: a key itself is refused in a config file"))
                });
            }
            let Some(known) = known().find(|known| known.name == name) else {
                let names: Vec<&str> = known().map(|known| known.name).collect();
                return Err(self.problem(name, format!("in {}: {}", self.header, unknown("key", name, &names))));
            };
            if texts_of(value.get_ref(), known.kind).is_none() {
                return Err(self.problem(name, format!("in {}: {name} must be {}", self.header, known.kind.describe())));
            }
        }
        Ok(())
    }

    fn texts(&self, key: &str) -> Option<Vec<String>> {
        texts_of(self.table.get(key)?.get_ref(), Kind::Texts)
    }

    fn required(&self, key: &str) -> Result<String, Problem> {
        let text = self.texts(key).and_then(|mut texts| texts.pop()).filter(|text| !text.trim().is_empty());
        text.ok_or_else(|| self.problem(key, format!("in {}: {key} is missing or empty", self.header)))
    }

    fn flag(&self, key: &str) -> Option<bool> {
        match self.table.get(key)?.get_ref() {
            DeValue::Boolean(value) => Some(*value),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;

    fn message(text: &str) -> String {
        let problem = parse(text).unwrap_err();
        format!("{}: {} ({})", problem.line.unwrap(), problem.message, problem.hint.unwrap_or_default())
    }

    #[test]
    fn tables_are_read_with_their_lines_in_any_order() {
        let tables = parse(
            "[[adapters]]\nname = \"a\"\nsource = \"org/repo\"\ntenants = [\"acme\"]\npinned = true\n\
             [[adapters]]\nname = \"b\"\nsource = \"/b\"\n\
             [adapter_dir]\npath = \"/srv\"\nwatch = false\n\
             [[tenants]]\nname = \"acme\"\napi_key_env = \"ACME_KEY\"\n",
        )
        .unwrap()
        .tables;
        let [a, b] = &tables.adapters[..] else { panic!("{tables:?}") };
        assert_eq!((a.line, a.name.as_str(), a.source.as_str(), a.pinned), (1, "a", "org/repo", true));
        assert_eq!(a.tenants.as_deref(), Some(&["acme".to_owned()][..]));
        assert_eq!((b.line, b.tenants.as_deref(), b.pinned), (6, None, false));
        let folder = tables.folder.unwrap();
        assert_eq!((folder.line, folder.path.as_str(), folder.watch), (9, "/srv", false));
        assert_eq!((tables.tenants[0].line, tables.tenants[0].api_key_env.as_str()), (12, "ACME_KEY"));
        assert!(parse("[adapter_dir]\npath = \"/srv\"").unwrap().tables.folder.unwrap().watch, "unless told otherwise");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line_and_a_way_out() {
        let adapter = "[[adapters]]\nname = \"a\"\nsource = \"/a\"\n";
        let tenant = "[[tenants]]\nname = \"acme\"\napi_key_env = \"ACME\"\n";
        for (text, expected) in [
            (format!("{adapter}{adapter}"), "5: the adapter \"a\" is in line 1 already"),
            (format!("{tenant}{tenant}"), "5: the tenant \"acme\" is in line 1 already"),
            (
                format!("{tenant}{adapter}tenants = [\"acne\"]"),
                "4: the adapter \"a\" is for the tenant \"acne\", which is not there; did you mean \"acme\"?",
            ),
            (format!("{adapter}tenants = []"), "4: the adapter \"a\" has an empty list of tenants"),
            (
                format!("{adapter}tenants = 3"),
                "4: in [[adapters]]: tenants must be a string in quotes, or a list of them",
            ),
            (format!("{adapter}pined = true"), "4: in [[adapters]]: unknown key `pined`; did you mean `pinned`?"),
            ("[[adapters]]\nname = \"a\"".to_owned(), "1: in [[adapters]]: source is missing"),
            (
                "[[adapters]]\nname = \" a\"\nsource = \"x\"".to_owned(),
                "2: the adapter's name \" a\" has blanks around it",
            ),
            ("[adapters]\nname = \"a\"".to_owned(), "1: write the header of `adapters` as [[adapters]]"),
            ("[[adapter_dir]]\npath = \"a\"".to_owned(), "1: write the header of `adapter_dir` as [adapter_dir]"),
            ("adapters = [1]".to_owned(), "1: [[adapters]] is a table"),
            (format!("{tenant}weight = 2"), "4: in [[tenants]]: `weight` is not in this version yet (remove the key"),
            ("[[tenants]]\nname = \"a\"".to_owned(), "1: in [[tenants]]: api_key_env is missing"),
        ] {
            assert!(message(&text).starts_with(expected), "{text}: {}", message(&text));
        }
    }

    #[test]
    fn a_tenants_key_itself_is_refused_and_not_repeated() {
        for line in ["api_key = \"s3cret\"", "api_key_env = \"sk-s3cret\""] {
            let said = message(&format!("[[tenants]]\nname = \"a\"\n{line}"));
            assert!(said.starts_with("3: ") && !said.contains("s3cret") && said.contains("environment"), "{said}");
        }
    }
}
