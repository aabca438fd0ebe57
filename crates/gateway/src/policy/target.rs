//! A place that answers.
//!
//! **Invariant**: what names an upstream is never taken for a local model, and the other way round: a configured
//! upstream's name and a slash in front decide.

use std::{collections::BTreeSet, fmt, sync::Arc};

/// A place that answers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// The model served here.
    Local,
    /// A name that this process serves: the base by one of its names, or an adapter.
    LocalModel(Arc<str>),
    /// A model of an upstream.
    Upstream {
        /// As it is configured.
        upstream: Arc<str>,
        /// As the upstream calls it.
        model: Arc<str>,
    },
}

impl Target {
    /// Reads `local`, `UPSTREAM/MODEL` of a configured upstream, or a local name.
    pub fn parse(text: &str, upstreams: &BTreeSet<Arc<str>>) -> Self {
        if text == "local" {
            return Self::Local;
        }
        match text.split_once('/') {
            Some((upstream, model)) if upstreams.contains(upstream) && !model.is_empty() => {
                Self::Upstream { upstream: upstream.into(), model: model.into() }
            }
            _ => Self::LocalModel(text.into()),
        }
    }

    /// Whether it runs in this process.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Local | Self::LocalModel(_) => true,
            Self::Upstream { .. } => false,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::LocalModel(name) => f.write_str(name),
            Self::Upstream { upstream, model } => write!(f, "{upstream}/{model}"),
        }
    }
}

/// Whether a name fits a pattern of an allow list: the name itself, or a beginning with `*` at the end.
pub fn fits(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |beginning| name.starts_with(beginning))
}
