//! The tables of the config file that have no flags: adapters, their folder, and what the gateway has read.
//!
//! What can be said by the file alone is said here, with its line; what takes the environment or the disk is
//! [`crate::adapters`]'. Invariant: names in here are valid and unique, and every tenant that is named is there.

use std::sync::Arc;

use bindery_engine::adapters::check_name;
use bindery_gateway::config::{GatewayConfig, Problem};
use bindery_hub::card::nearest;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    keys::{Kind, TABLE_KEYS},
    texts_of, unknown,
};

/// What the file says in tables.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileTables {
    pub(crate) adapters: Vec<AdapterTable>,
    pub(crate) folders: Vec<FolderTable>,
    /// Names of tenants, right or wrong, and where they stand.
    pub(crate) tenants: Vec<TenantLine>,
    /// None where no file was read.
    pub(crate) gateway: Option<Arc<GatewayConfig>>,
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

/// `[adapter_dir]`, or one of several `[[adapter_dir]]`.
#[derive(Clone, Debug)]
pub(crate) struct FolderTable {
    pub(crate) line: usize,
    pub(crate) path: String,
    pub(crate) watch: bool,
    pub(crate) tenants: Option<Vec<String>>,
}

/// Where a `[[tenants]]` stands.
#[derive(Clone, Debug)]
pub(crate) struct TenantLine {
    pub(crate) line: usize,
    pub(crate) name: String,
}

/// The tenants' names, whatever else is wrong with their tables.
pub(super) fn tenant_lines(document: &DeTable<'_>, line_of: &dyn Fn(usize) -> usize) -> Vec<TenantLine> {
    let tables = match document.get("tenants").map(Spanned::get_ref) {
        Some(DeValue::Array(tables)) => tables.iter().collect(),
        _ => Vec::new(),
    };
    let named = |table: &Spanned<DeValue<'_>>| {
        let name = table.get_ref().as_table()?.get("name")?.get_ref().as_str()?.to_owned();
        Some(TenantLine { line: line_of(table.span().start), name })
    };
    tables.into_iter().filter_map(named).collect()
}

/// Whether a section is one of these tables.
pub(super) fn is_table(name: &str) -> bool {
    header_of(name).is_some()
}

/// The section that may stand once or several times.
const ADAPTER_DIR: &str = "adapter_dir";

fn header_of(name: &str) -> Option<&'static str> {
    TABLE_KEYS.iter().map(|key| key.header).find(|header| header.trim_matches(['[', ']']) == name)
}

impl FileTables {
    /// Takes in one section of the file, and says what is wrong with it: the first mistake of each table.
    pub(super) fn read(
        &mut self,
        name: &str,
        at: usize,
        value: &DeValue<'_>,
        line_of: &dyn Fn(usize) -> usize,
    ) -> Vec<Problem> {
        let header = header_of(name).unwrap_or_default();
        let problem = |at: usize, message: String| Problem { line: Some(line_of(at)), message, hint: None };
        let mut problems = Vec::new();
        let tables: Vec<(usize, &DeTable<'_>)> = match (value, header.starts_with("[[")) {
            (DeValue::Table(table), false) => vec![(at, table)],
            (DeValue::Array(items), is_many) if is_many || name == ADAPTER_DIR => items
                .iter()
                .filter_map(|item| {
                    let at = item.span().start;
                    if item.get_ref().as_table().is_none() {
                        let message = format!("{header} is a table: write its header, and its keys below");
                        problems.push(problem(at, message));
                    }
                    Some((at, item.get_ref().as_table()?))
                })
                .collect(),
            _ => return vec![problem(at, format!("write the header of `{name}` as {header}, and its keys below"))],
        };
        for (at, table) in tables {
            problems.extend(self.add(name, &Fields { header, table, at, line_of }).err());
        }
        problems
    }

    fn add(&mut self, name: &str, fields: &Fields<'_>) -> Result<(), Problem> {
        fields.check_keys()?;
        if name == "adapters" {
            return self.add_adapter(fields);
        }
        let (line, path) = (fields.line(), fields.required("path")?);
        if let Some(other) = self.folders.iter().find(|other| other.path == path) {
            let message = format!("the adapters' folder {path} is in line {} already", other.line);
            return Err(fields.problem("path", message));
        }
        let tenants = fields.tenants(&format!("the adapters' folder {path}"))?;
        self.folders.push(FolderTable { line, path, watch: fields.flag("watch").unwrap_or(true), tenants });
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
        let tenants = fields.tenants(&format!("the adapter {name:?}"))?;
        let pinned = fields.flag("pinned").unwrap_or(false);
        let line = fields.line();
        self.adapters.push(AdapterTable { line, name, source: fields.required("source")?, tenants, pinned });
        Ok(())
    }

    /// Adapters for tenants that are not there. After the whole file is read: tenants may stand below the adapters that
    /// name them.
    pub(super) fn strangers(&self) -> Vec<Problem> {
        let known: Vec<&str> = self.tenants.iter().map(|tenant| tenant.name.as_str()).collect();
        let problem = |(what, line, tenants): (String, usize, &Option<Vec<String>>)| {
            let stranger = tenants.iter().flatten().find(|tenant| !known.contains(&tenant.as_str()))?;
            let near = nearest(stranger, known.iter().copied()).first().map(|near| format!("; did you mean {near:?}?"));
            Some(Problem {
                line: Some(line),
                message: format!(
                    "{what} is for the tenant {stranger:?}, which is not there{}",
                    near.unwrap_or_default()
                ),
                hint: Some(format!("add a [[tenants]] with name = {stranger:?}, or correct the name")),
            })
        };
        let adapters = self.adapters.iter();
        let adapters = adapters.map(|it| (format!("the adapter {:?}", it.name), it.line, &it.tenants));
        let folders = self.folders.iter();
        let folders = folders.map(|it| (format!("the adapters' folder {}", it.path), it.line, &it.tenants));
        adapters.chain(folders).filter_map(problem).collect()
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

    /// Who may use it; None: everyone.
    fn tenants(&self, of: &str) -> Result<Option<Vec<String>>, Problem> {
        let tenants = self.texts("tenants");
        if tenants.as_ref().is_some_and(Vec::is_empty) {
            let message = format!("{of} has an empty list of tenants, so that nobody could use it");
            return Err(Problem {
                hint: Some("name tenants, or leave the key out: then everyone may".to_owned()),
                ..self.problem("tenants", message)
            });
        }
        Ok(tenants)
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
        let problem = parse(text).unwrap_err().remove(0);
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
        let folder = &tables.folders[0];
        assert_eq!((folder.line, folder.path.as_str(), folder.watch), (9, "/srv", false));
        assert_eq!((tables.tenants[0].line, tables.tenants[0].name.as_str()), (12, "acme"));
        assert_eq!(tables.gateway.unwrap().tenants[0].api_key_env.as_deref(), Some("ACME_KEY"));
        let tables = parse(
            "[[adapter_dir]]\npath = \"/srv\"\n[[adapter_dir]]\npath = \"/acme\"\ntenants = [\"acme\"]\n\
             [[tenants]]\nname = \"acme\"\napi_key_env = \"ACME_KEY\"\n",
        );
        let [everyones, acmes] = &tables.unwrap().tables.folders[..] else { panic!("two folders") };
        assert!(everyones.watch && everyones.tenants.is_none(), "unless told otherwise");
        assert_eq!((acmes.line, acmes.tenants.as_deref()), (3, Some(&["acme".to_owned()][..])));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line_and_a_way_out() {
        let adapter = "[[adapters]]\nname = \"a\"\nsource = \"/a\"\n";
        let tenant = "[[tenants]]\nname = \"acme\"\napi_key_env = \"ACME\"\n";
        for (text, expected) in [
            (format!("{adapter}{adapter}"), "5: the adapter \"a\" is in line 1 already"),
            (format!("{tenant}{tenant}"), "5: the tenant \"acme\" is in line 2 already"),
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
            ("adapter_dir = \"a\"".to_owned(), "1: write the header of `adapter_dir` as [adapter_dir]"),
            (
                "[[adapter_dir]]\npath = \"/a\"\n[[adapter_dir]]\npath = \"/a\"".to_owned(),
                "4: the adapters' folder /a is in line 1 already",
            ),
            (
                format!("{tenant}[adapter_dir]\npath = \"/a\"\ntenants = [\"acne\"]"),
                "4: the adapters' folder /a is for the tenant \"acne\", which is not there; did you mean \"acme\"?",
            ),
            ("adapters = [1]".to_owned(), "1: [[adapters]] is a table"),
            (format!("{tenant}wight = 2"), "4: unknown field `wight`, expected one of `name`, `api_key_env`"),
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
