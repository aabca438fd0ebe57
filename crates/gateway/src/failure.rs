//! What happens to a request when something that ought to look at it, or to keep it, fails: the same two words wherever a config
//! may choose.

use serde::Deserialize;

/// `on_failure`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// The request fails, or counts as one in which something was found.
    #[default]
    Closed,
    /// The request goes on, and it is counted.
    Open,
}
