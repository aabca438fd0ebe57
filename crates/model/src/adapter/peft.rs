//! adapter_config.json as peft understands it: what scales each module, and what is asked for beyond plain LoRA.
//!
//! Source: peft 0.21 (`LoraConfig`, `check_target_module_exists`, `get_pattern_key`, `LoraLayer.update_layer`). It must not
//! know tensors or the base. Its invariant: whatever changes what peft computes is honoured or refused by its key; keys that
//! only matter in training are left alone.

use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value};

use super::pattern::{self, SuffixPattern};
use crate::{
    ModelError,
    weights::mmap::{Within, read_text_within},
};

/// Those in use have some kB; patterns that name every module some hundreds.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Each module may have a pattern of its own.
const MAX_PATTERNS: usize = 8192;
/// Of patterns that are expressions and not names.
const MAX_EXPRESSIONS: usize = 256;
/// peft's, for keys that are absent.
const DEFAULT_RANK: usize = 8;
const DEFAULT_ALPHA: f64 = 8.0;

/// What an adapter's config says of its modules.
#[derive(Debug)]
pub(super) struct PeftConfig {
    pub(super) rank: usize,
    pub(super) alpha: f64,
    pub(super) base: Option<String>,
    rank_stabilized: bool,
    ranks: Vec<(SuffixPattern, usize)>,
    alphas: Vec<(SuffixPattern, f64)>,
    targets: Option<Selection>,
    excluded: Option<Selection>,
    /// Empty: all.
    layers: Vec<u64>,
    /// layers_pattern: what stands in front of a layer's number in a module's name. Empty: as the base has it.
    layer_patterns: Vec<Regex>,
}

/// Modules by name.
#[derive(Debug)]
enum Selection {
    /// Whole names, or their ends.
    Names(Vec<String>),
    /// The whole name.
    Expression(Regex),
    /// "all-linear", or an expression that only Python's `re` understands: nothing to hold names against.
    Anything,
}

type Outcome<T> = Result<T, String>;

/// An error that goes beyond the file's own rules, or one that breaks them.
enum Refusal {
    Bad(String),
    Unsupported(String),
}

impl From<String> for Refusal {
    fn from(what: String) -> Self {
        Self::Bad(what)
    }
}

impl PeftConfig {
    pub(super) fn read(path: &Path, within: Within<'_>) -> Result<Self, ModelError> {
        let text = read_text_within(path, MAX_CONFIG_BYTES, within)?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|error| ModelError::bad_file(path, format!("this is not valid JSON: {error}")))?;
        let Value::Object(keys) = &value else {
            return Err(ModelError::bad_file(path, "this is not a JSON object; adapter_config.json of peft is one"));
        };
        Self::from_keys(keys, path).map_err(|refusal| match refusal {
            Refusal::Bad(what) => ModelError::bad_file(path, what),
            Refusal::Unsupported(what) => ModelError::unsupported(path, what),
        })
    }

    fn from_keys(keys: &Map<String, Value>, path: &Path) -> Result<Self, Refusal> {
        refuse_other_methods(keys)?;
        let rank = match get(keys, "r") {
            None => DEFAULT_RANK,
            Some(value) => rank(value, "r")?,
        };
        let alpha = match get(keys, "lora_alpha") {
            None => DEFAULT_ALPHA,
            Some(value) => number(value, "lora_alpha")?,
        };
        let ranks = patterns(keys, "rank_pattern", self::rank)?;
        let alphas = patterns(keys, "alpha_pattern", number)?;
        let base = get(keys, "base_model_name_or_path").and_then(Value::as_str).map(str::to_owned);
        Ok(Self {
            rank,
            alpha,
            base,
            rank_stabilized: truth(keys, "use_rslora")?,
            ranks,
            alphas,
            targets: selection(keys, "target_modules", path)?,
            excluded: selection(keys, "exclude_modules", path)?,
            layers: layers(keys)?,
            layer_patterns: layer_patterns(keys)?,
        })
    }

    /// What `b a x` of a module is multiplied with; `rank` is that of its tensors. An error where the config has another
    /// rank for it: peft does not load such an adapter.
    pub(super) fn scaling(&self, module: &str, rank: usize) -> Outcome<f64> {
        let expected = find(&self.ranks, module).unwrap_or(self.rank);
        if expected != rank {
            return Err(format!(
                "the tensors of {module:?} have rank {rank}, adapter_config.json says {expected} (r and rank_pattern); \
                 one of the two files is of another adapter"
            ));
        }
        let alpha = find(&self.alphas, module).unwrap_or(self.alpha);
        let divisor = if self.rank_stabilized { (rank as f64).sqrt() } else { rank as f64 };
        Ok(alpha / divisor)
    }

    /// Whether peft would use a module's tensors; the text of an error says why not. `layer` is None for the head.
    pub(super) fn check_targeted(&self, module: &str, layer: Option<usize>) -> Outcome<()> {
        let left_out = |why: String| {
            Err(format!(
                "tensors of {module:?} are in the file, but {why}, so peft leaves them out; correct adapter_config.json, or \
                 remove the tensors"
            ))
        };
        if self.excluded.as_ref().is_some_and(|excluded| excluded.has(module)) {
            return left_out("exclude_modules names it".to_owned());
        }
        let Some(targets) = &self.targets else { return Ok(()) };
        if !targets.has(module) {
            return left_out("target_modules does not name it".to_owned());
        }
        // A whole name is taken whatever the layers are.
        let is_whole = matches!(targets, Selection::Names(names) if names.iter().any(|name| name == module));
        if self.layers.is_empty() || is_whole {
            return Ok(());
        }
        let layer = if self.layer_patterns.is_empty() {
            layer.map(|layer| layer as u64)
        } else {
            match pattern::layer_of(module, &self.layer_patterns) {
                Some(layer) => Some(layer),
                None => return left_out("layers_pattern finds no layer's number in its name".to_owned()),
            }
        };
        match layer {
            Some(layer) if self.layers.contains(&layer) => Ok(()),
            _ => left_out("layers_to_transform does not list its layer".to_owned()),
        }
    }
}

impl Selection {
    fn has(&self, module: &str) -> bool {
        match self {
            Self::Names(names) => names.iter().any(|name| {
                let front = module.strip_suffix(name.as_str());
                front.is_some_and(|front| front.is_empty() || front.ends_with('.'))
            }),
            Self::Expression(regex) => regex.is_match(module),
            Self::Anything => true,
        }
    }
}

/// The first pattern that matches decides, in the order of the file.
fn find<T: Copy>(patterns: &[(SuffixPattern, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.matches(module)).map(|&(_, value)| value)
}

/// Keys of methods that compute something else, and what there is to do about each.
const OTHER_METHODS: &[(&str, &str)] = &[
    (
        "use_dora",
        "DoRA, which scales whole rows of the base's weights; merge it into the base with peft's merge_and_unload",
    ),
    ("use_qalora", "QALoRA, which pools inputs; merge it into the base with peft's merge_and_unload"),
    ("lora_bias", "a bias of its own in every module; merge it into the base with peft's merge_and_unload"),
    (
        "fan_in_fan_out",
        "matrices stored the other way round, which no architecture here has; save the adapter from a base of this family",
    ),
    ("use_bdlora", "block-diagonal LoRA; train a plain LoRA adapter"),
    ("arrow_config", "Arrow, which chooses among several adapters by token; serve those one by one"),
    ("kasa_config", "KaSA, which changes the base's weights; merge it into the base with peft's merge_and_unload"),
    ("monteclora_config", "MonteCLoRA, which samples its weights; train a plain LoRA adapter"),
    ("alora_invocation_tokens", "activated LoRA, which begins in the middle of a prompt; train a plain LoRA adapter"),
    (
        "layer_replication",
        "layers of the base used more than once; merge it into the base, and serve the result as a model",
    ),
    (
        "target_parameters",
        "adapters of parameters (stacked experts), which are not supported yet; adapters of attention are",
    ),
    (
        "trainable_token_indices",
        "embeddings of some tokens trained along; merge it into the base with peft's merge_and_unload",
    ),
    (
        "modules_to_save",
        "modules trained whole and saved along, which are not low-rank; merge it into the base with peft's merge_and_unload",
    ),
];

/// Ways to initialise that leave the base's weights as they are (peft's `LoraLayer.update_layer`).
const INITIALISERS: [&str; 6] = ["true", "false", "gaussian", "eva", "orthogonal", "mica"];

fn refuse_other_methods(keys: &Map<String, Value>) -> Result<(), Refusal> {
    match get(keys, "peft_type") {
        Some(Value::String(method)) if method == "LORA" => {}
        Some(Value::String(method)) => {
            let what = format!(
                "peft_type is {:?}, which is not supported; \"LORA\" is: merge the adapter into the base with peft's \
                 merge_and_unload and serve the result as a model, or train a LoRA adapter",
                clipped(method)
            );
            return Err(Refusal::Unsupported(what));
        }
        Some(value) => return Err(wrong("peft_type", value, "\"LORA\"").into()),
        None => {
            let what = "peft_type is missing; adapter_config.json of a LoRA adapter has \"peft_type\": \"LORA\"";
            return Err(Refusal::Bad(what.to_owned()));
        }
    }
    for (key, what) in OTHER_METHODS {
        if get(keys, key).is_some_and(is_set) {
            return Err(Refusal::Unsupported(format!("{key} is set: {what}")));
        }
    }
    let Some(initialiser) = get(keys, "init_lora_weights") else { return Ok(()) };
    let name = match initialiser {
        Value::Bool(value) => value.to_string(),
        Value::String(name) => name.to_lowercase(),
        other => return Err(wrong("init_lora_weights", other, "true, false or a name").into()),
    };
    if INITIALISERS.contains(&name.as_str()) {
        return Ok(());
    }
    // PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ take something away from the base before training begins.
    Err(Refusal::Unsupported(format!(
        "init_lora_weights is {}, so the adapter belongs to a changed base (known not to change it are {}); save it with \
         peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain LoRA adapter of it",
        short(initialiser),
        INITIALISERS.join(", ")
    )))
}

/// Not null (that is absent), not false, not empty.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Bool(value) => *value,
        Value::Array(values) => !values.is_empty(),
        Value::Object(values) => !values.is_empty(),
        Value::String(text) => !text.is_empty(),
        Value::Null => false,
        Value::Number(_) => true,
    }
}

fn get<'a>(keys: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    keys.get(key).filter(|value| !value.is_null())
}

fn truth(keys: &Map<String, Value>, key: &str) -> Outcome<bool> {
    match get(keys, key) {
        None => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(value) => Err(wrong(key, value, "true or false")),
    }
}

/// Whether it is within limits its tensors say.
fn rank(value: &Value, key: &str) -> Outcome<usize> {
    let rank = value.as_u64().filter(|&rank| rank > 0).and_then(|rank| usize::try_from(rank).ok());
    rank.ok_or_else(|| wrong(key, value, "a whole number from 1"))
}

fn number(value: &Value, key: &str) -> Outcome<f64> {
    value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| wrong(key, value, "a number"))
}

fn patterns<T>(
    keys: &Map<String, Value>,
    key: &str,
    read: impl Fn(&Value, &str) -> Outcome<T>,
) -> Outcome<Vec<(SuffixPattern, T)>> {
    let entries = match get(keys, key) {
        None => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(value) => return Err(wrong(key, value, "an object")),
    };
    if entries.len() > MAX_PATTERNS {
        return Err(format!("{key} has {} entries; at most {MAX_PATTERNS} are read", entries.len()));
    }
    let mut num_expressions = 0;
    let mut patterns = Vec::with_capacity(entries.len());
    for (name, value) in entries {
        let here = format!("{key}[{:?}]", clipped(name));
        let pattern = SuffixPattern::new(name)
            .map_err(|what| format!("{here}: this expression cannot be read as Python reads it: {what}"))?;
        num_expressions += usize::from(pattern.is_expression());
        if num_expressions > MAX_EXPRESSIONS {
            return Err(format!(
                "{key} has more than {MAX_EXPRESSIONS} regular expressions; write names of modules instead"
            ));
        }
        patterns.push((pattern, read(value, &here)?));
    }
    Ok(patterns)
}

fn selection(keys: &Map<String, Value>, key: &str, path: &Path) -> Outcome<Option<Selection>> {
    match get(keys, key) {
        None => Ok(None),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => Ok(Some(Selection::Anything)),
        Some(Value::String(expression)) => match pattern::whole(expression) {
            Ok(regex) => Ok(Some(Selection::Expression(regex))),
            // Which modules there are the tensors say, too; only the check is lost.
            Err(what) if key == "target_modules" => {
                tracing::warn!("{}: {key} is not checked, for its expression cannot be read: {what}", path.display());
                Ok(Some(Selection::Anything))
            }
            Err(what) => {
                tracing::warn!("{}: {key} is not checked, for its expression cannot be read: {what}", path.display());
                Ok(None)
            }
        },
        Some(Value::Array(names)) if names.is_empty() => Ok(None),
        Some(Value::Array(names)) if names.len() <= MAX_PATTERNS => {
            let name =
                |name: &Value| name.as_str().map(str::to_owned).ok_or_else(|| wrong(key, name, "names of modules"));
            names.iter().map(name).collect::<Outcome<_>>().map(|names| Some(Selection::Names(names)))
        }
        Some(Value::Array(names)) => Err(format!("{key} has {} names; at most {MAX_PATTERNS} are read", names.len())),
        Some(value) => Err(wrong(key, value, "a list of names or an expression")),
    }
}

/// One layer or several; none where all are meant.
fn layers(keys: &Map<String, Value>) -> Outcome<Vec<u64>> {
    let key = "layers_to_transform";
    let layer = |value: &Value| value.as_u64().ok_or_else(|| wrong(key, value, "a layer's number or a list of them"));
    match get(keys, key) {
        None => Ok(Vec::new()),
        Some(Value::Array(layers)) if layers.len() > MAX_PATTERNS => {
            Err(format!("{key} has {} layers; at most {MAX_PATTERNS} are read", layers.len()))
        }
        Some(Value::Array(layers)) => layers.iter().map(layer).collect(),
        Some(value) => layer(value).map(|layer| vec![layer]),
    }
}

/// One expression or several.
fn layer_patterns(keys: &Map<String, Value>) -> Outcome<Vec<Regex>> {
    let key = "layers_pattern";
    let pattern = |value: &Value| {
        let text = value.as_str().ok_or_else(|| wrong(key, value, "an expression or a list of them"))?;
        pattern::layer(text).map_err(|what| {
            format!("{key}[{:?}]: this expression cannot be read as Python reads it: {what}", clipped(text))
        })
    };
    match get(keys, key) {
        None => Ok(Vec::new()),
        Some(Value::Array(patterns)) if patterns.len() > MAX_EXPRESSIONS => {
            Err(format!("{key} has {} expressions; at most {MAX_EXPRESSIONS} are read", patterns.len()))
        }
        Some(Value::Array(patterns)) => patterns.iter().map(pattern).collect(),
        Some(Value::String(text)) if text.is_empty() => Ok(Vec::new()),
        Some(value) => pattern(value).map(|pattern| vec![pattern]),
    }
}

fn wrong(key: &str, value: &Value, expected: &str) -> String {
    format!("{key} is {}; {expected} is expected", short(value))
}

/// A value as a message shows it.
fn short(value: &Value) -> String {
    match value {
        Value::Array(values) => format!("a list of {}", values.len()),
        Value::Object(values) => format!("an object of {} keys", values.len()),
        Value::String(text) => format!("{:?}", clipped(text)),
        other => other.to_string(),
    }
}

fn clipped(text: &str) -> String {
    text.chars().take(80).collect()
}
