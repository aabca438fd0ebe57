//! Logs on stderr, as text or JSON. `RUST_LOG` chooses what is logged; by default the life of the process.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::args::LogFormat;

/// Once, at the start of a verb that serves.
pub(crate) fn init(format: LogFormat) {
    // hf-hub logs as errors what is no failure while another source is left; the fetch itself says what matters.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,hf_hub=off"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = match format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Text => {
            let is_plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            builder.with_ansi(std::io::stderr().is_terminal() && !is_plain).with_target(false).try_init()
        }
    };
    // Only a second call can fail, and the first one's logger is as good.
    drop(done);
}
