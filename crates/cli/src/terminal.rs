//! The terminal: stdout for data, stderr for people; colour only where a person reads and has not asked for none.

use std::{
    io::{self, IsTerminal, Write},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bindery_hub::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::LogFormat;

/// Writes to stdout. Unlike `println!`, a reader that has gone away is an error, not a panic.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// How the terminal of stdin takes keys: whole lines, echoed, or each key at once.
pub(crate) struct Mode {
    /// None where stdin is no terminal.
    #[cfg(unix)]
    flags: Option<nix::sys::termios::Termios>,
}

impl Mode {
    /// As it is now.
    pub(crate) fn now() -> Self {
        Self {
            #[cfg(unix)]
            flags: nix::sys::termios::tcgetattr(io::stdin()).ok(),
        }
    }

    /// Takes the terminal from an editor that is still reading, for a program that ends at once.
    pub(crate) fn restore(&self) {
        #[cfg(unix)]
        if let Some(before) = &self.flags
            && Self::now().flags.as_ref() != Some(before)
        {
            use nix::sys::termios::{SetArg, tcsetattr};
            // Not once everything is shown: that would wait for a terminal that shows nothing more.
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, before);
            if io::stdout().is_terminal() {
                let _ = print(PASTES_UNMARKED);
            }
        }
        // What comes next does not stand behind the half-typed line.
        eprintln!();
    }
}

/// To the terminal: begin and end of what is pasted need no mark any more.
#[cfg(unix)]
const PASTES_UNMARKED: &str = "\x1b[?2004l";

/// Colours, or none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    is_on: bool,
}

impl Style {
    pub(crate) fn for_stderr() -> Self {
        Self::when(io::stderr().is_terminal())
    }

    pub(crate) fn for_stdout() -> Self {
        Self::when(io::stdout().is_terminal())
    }

    fn when(is_terminal: bool) -> Self {
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { is_on: is_terminal && !is_set("NO_COLOR") && !is_dumb }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.is_on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    pub(crate) fn error(self, text: &str) -> String {
        self.paint("1;31", text)
    }

    pub(crate) fn warning(self, text: &str) -> String {
        self.paint("1;33", text)
    }

    pub(crate) fn good(self, text: &str) -> String {
        self.paint("32", text)
    }
}

/// A warning that must be seen.
pub(crate) fn warn(message: &str) {
    eprintln!("{} {message}", Style::for_stderr().warning("warning:"));
}

/// Something to know.
pub(crate) fn note(message: &str) {
    eprintln!("{} {message}", Style::for_stderr().dim("note:"));
}

/// The same, as an event where the log is for machines.
pub(crate) fn note_in(log_format: LogFormat, message: &str) {
    match log_format {
        LogFormat::Text => note(message),
        LogFormat::Json => tracing::info!("{message}"),
    }
}

/// A bar over bytes on stderr; nothing is drawn where stderr is no terminal, or a log for machines.
pub(crate) fn byte_bar(what: &str, total: Option<u64>, log_format: LogFormat) -> ProgressBar {
    if log_format == LogFormat::Json {
        return ProgressBar::hidden();
    }
    bar(
        what,
        total,
        "{prefix:.dim} {wide_bar:.cyan/dim} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
    )
}

/// A bar over things on stderr.
pub(crate) fn count_bar(what: &str, total: u64) -> ProgressBar {
    bar(what, Some(total), "{prefix:.dim} {wide_bar:.cyan/dim} {pos}/{len} {elapsed}")
}

fn bar(what: &str, total: Option<u64>, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(10));
    let style = match total {
        Some(_) => ProgressStyle::with_template(template),
        None => ProgressStyle::with_template("{prefix:.dim} {spinner} {decimal_bytes} {decimal_bytes_per_sec}"),
    };
    bar.set_style(style.expect("the templates above are well formed").progress_chars("━━─"));
    bar.set_prefix(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Shows a fetch: a bar in a terminal, a line a quarter elsewhere (a log of a container, a CI run), which is an event where
/// the log is for machines.
#[derive(Default)]
pub(crate) struct FetchProgress {
    task: Mutex<Option<Task>>,
    log_format: LogFormat,
}

struct Task {
    bar: ProgressBar,
    what: String,
    total: Option<u64>,
    done: u64,
}

/// Below this a task is over before a line about it would be read.
const WORTH_A_LINE_BYTES: u64 = 10_000_000;

impl FetchProgress {
    pub(crate) fn new(log_format: LogFormat) -> Self {
        Self { log_format, ..Self::default() }
    }

    fn with_task(&self, act: impl FnOnce(&mut Option<Task>)) {
        act(&mut self.task.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Progress for FetchProgress {
    fn start(&self, what: &str, total_bytes: Option<u64>) {
        let bar = byte_bar(what, total_bytes, self.log_format);
        if bar.is_hidden() && total_bytes.is_none_or(|total| total >= WORTH_A_LINE_BYTES) {
            match (self.log_format, total_bytes) {
                (LogFormat::Json, _) => tracing::info!(bytes = total_bytes, "{what}"),
                (LogFormat::Text, Some(total)) => eprintln!("{what} ({})", size(total)),
                (LogFormat::Text, None) => eprintln!("{what}"),
            }
        }
        self.with_task(|task| *task = Some(Task { bar, what: what.to_owned(), total: total_bytes, done: 0 }));
    }

    fn advance(&self, bytes: u64) {
        self.with_task(|task| {
            let Some(task) = task else { return };
            let quarter = |done: u64| task.total.map_or(0, |total| done.saturating_mul(4) / total.max(1));
            let (before, after) = (quarter(task.done), quarter(task.done + bytes));
            task.done += bytes;
            task.bar.inc(bytes);
            if task.bar.is_hidden() && after > before && task.total.is_some_and(|total| total >= WORTH_A_LINE_BYTES) {
                let percent = (after * 25).min(100);
                match self.log_format {
                    LogFormat::Json => tracing::info!(percent, "{}", task.what),
                    LogFormat::Text => eprintln!("{}: {percent} %", task.what),
                }
            }
        });
    }

    fn finish(&self) {
        self.with_task(|task| {
            if let Some(task) = task.take() {
                task.bar.finish_and_clear();
            }
        });
    }

    fn note(&self, message: &str) {
        let told = || note_in(self.log_format, message);
        self.with_task(|task| match task {
            Some(task) => task.bar.suspend(told),
            None => told(),
        });
    }
}

/// Bytes as people read them: decimal, as disks and downloads are sold.
pub(crate) fn size(bytes: u64) -> String {
    bytesize::ByteSize::b(bytes).display().si().to_string()
}

/// Parameters as people name models: 135 M, 7.2 B.
pub(crate) fn parameters(count: u64) -> String {
    match count {
        0..1_000_000 => format!("{count}"),
        1_000_000..1_000_000_000 => format!("{:.0} M", count as f64 / 1e6),
        _ => format!("{:.1} B", count as f64 / 1e9),
    }
}

/// 16384 as 16,384.
pub(crate) fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_three() {
        for (count, expected) in [(0, "0"), (999, "999"), (1000, "1,000"), (1234567, "1,234,567")] {
            assert_eq!(thousands(count), expected);
        }
    }

    #[test]
    fn models_are_named_by_their_size() {
        assert_eq!(parameters(134_515_008), "135 M");
        assert_eq!(parameters(7_248_023_552), "7.2 B");
    }
}
