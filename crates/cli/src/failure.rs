//! How a failure reaches the user: one paragraph, a `hint:` line where there is a next step, and the exit code.

use std::{fmt, io, process::ExitCode};

use bindery_engine::EngineError;
use bindery_hub::HubError;
use bindery_model::ModelError;

use crate::{config::Problems, terminal::Style};

/// An error with a next step, and whether the usage was wrong.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    hint: Option<String>,
    is_usage: bool,
}

impl Failure {
    /// Something failed: exit code 1.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, is_usage: false }
    }

    /// What was typed or configured is wrong: exit code 2.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, is_usage: true }
    }

    /// The next step.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Ctrl-c before there was anything to stop cleanly.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Prints the error and chooses the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    // `bindery models | head`: whoever read stdout has seen enough.
    let is_broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(is_broken_pipe) {
        return ExitCode::SUCCESS;
    }
    let style = Style::for_stderr();
    if let Some(problems) = error.chain().find_map(|cause| cause.downcast_ref::<Problems>()) {
        for (message, hint) in problems.each() {
            eprintln!("{} {message}\n{} {hint}", style.error("error:"), style.bold("hint:"));
        }
        return ExitCode::from(2);
    }
    eprintln!("{} {}", style.error("error:"), in_one_sentence(error));
    let hint = error.chain().find_map(|cause| {
        cause
            .downcast_ref::<Failure>()
            .and_then(|failure| failure.hint.clone())
            .or_else(|| cause.downcast_ref::<HubError>().and_then(HubError::hint))
            .or_else(|| cause.downcast_ref::<EngineError>().and_then(engine_hint))
    });
    if let Some(hint) = hint {
        eprintln!("{} {hint}", style.bold("hint:"));
    }
    let is_usage = error.chain().any(|cause| cause.downcast_ref::<Failure>().is_some_and(|failure| failure.is_usage));
    ExitCode::from(if is_usage { 2 } else { 1 })
}

/// The error and its causes. What the text before a cause has told already is not told again: the whole cause, as the
/// errors of files do it, or the name that it begins with.
fn in_one_sentence(error: &anyhow::Error) -> String {
    error.chain().skip(1).map(ToString::to_string).fold(error.to_string(), |text, cause| {
        if text.ends_with(&cause) {
            return text;
        }
        // "cannot load w.gguf" and "w.gguf: the file is empty".
        match cause.split_once(": ") {
            Some((name, rest)) if text.split(' ').next_back() == Some(name) => format!("{text}: {rest}"),
            _ => format!("{text}: {cause}"),
        }
    })
}

fn engine_hint(error: &EngineError) -> Option<String> {
    match error {
        EngineError::Model(ModelError::BadFile { path, .. }) if path.ends_with("config.json") => {
            Some("compare it with the config.json that the model was published with".to_owned())
        }
        EngineError::Model(ModelError::BadFile { .. }) => {
            Some("the file is cut off, damaged or of another format: fetch or copy it again".to_owned())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let model = || ModelError::Io { path: "w.gguf".into(), source: io::Error::from(io::ErrorKind::NotFound) };
        let told = in_one_sentence(&anyhow::Error::new(model()).context("cannot load w.gguf"));
        assert_eq!(told, "cannot load w.gguf: cannot read w.gguf: entity not found");
        let empty = || ModelError::BadFile { path: "w.gguf".into(), what: "the file is empty".to_owned() };
        let told = in_one_sentence(&anyhow::Error::new(empty()).context("cannot load w.gguf"));
        assert_eq!(told, "cannot load w.gguf: the file is empty");
        // Another file, which has to be named.
        let told = in_one_sentence(&anyhow::Error::new(empty()).context("cannot load old-w.gguf"));
        assert_eq!(told, "cannot load old-w.gguf: w.gguf: the file is empty");
        let other: anyhow::Result<()> = Err(io::Error::from(io::ErrorKind::NotFound).into());
        assert_eq!(in_one_sentence(&other.context("cannot listen").unwrap_err()), "cannot listen: entity not found");
    }
}
