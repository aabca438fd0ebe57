//! `bindery chat`: a conversation in the terminal, with a model in this process or with any OpenAI-compatible server.
//!
//! Ctrl-c stops the answer, not the program; SIGTERM ends it, at the prompt too. Where stdin is no terminal each line is
//! a turn, nothing but answers goes to stdout, and the first failure ends the program.

use std::{
    io::{BufRead as _, IsTerminal as _, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bindery_engine::{AdapterLease, LocalModel, Prompt, RenderRequest, SamplingParams, TextEvent, TextRequest};
use bindery_hub::{FetchOptions, SharedProgress};
use futures::StreamExt as _;
use rustyline::{DefaultEditor, error::ReadlineError};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{
    adapters::AdapterSettings,
    args::{AdapterArgs, ChatArgs, LogFormat},
    client::{Client, ClientError},
    config::tables::FileTables,
    failure::{Failure, Interrupted},
    local,
    settings::{ModelSettings, model_from_environment},
    signals::StopSignals,
    terminal::{self, FetchProgress, Mode, Style},
};

/// Of one line of piped input; a longer one ends the program, as its rest would be taken for the next turn.
const MAX_LINE_BYTES: u64 = 1 << 20;

const HELP: &str = "\
/help            this list
/clear           forget the conversation
/system TEXT     what the model is told before the conversation; without TEXT: nothing
/save FILE       write the conversation to a JSON file, as OpenAI's messages
/quit            leave (ctrl-d too)
ctrl-c stops an answer
";

pub(crate) async fn run(args: ChatArgs) -> anyhow::Result<()> {
    let mut signals = StopSignals::listen()?;
    let backend = signals.unless_stopped(Box::pin(Backend::open(&args))).await.ok_or(Interrupted)??;
    let is_interactive = std::io::stdin().is_terminal();
    let mut chat = Chat {
        backend,
        sampling: Sampling { temperature: args.temperature, max_tokens: args.max_tokens, seed: args.seed },
        system: args.system,
        turns: Vec::new(),
        is_interactive,
        signals,
    };
    let mut lines = Lines::open(is_interactive)?;
    if is_interactive {
        let style = Style::for_stderr();
        eprintln!("{} with {}", style.bold("Chat"), chat.backend.describe());
        eprintln!("{}", style.dim("/help lists commands; ctrl-c stops an answer, ctrl-d leaves"));
    }
    let outcome = chat.converse(&mut lines).await;
    if let Backend::Local { model, adapter, .. } = chat.backend {
        drop(adapter);
        tokio::task::spawn_blocking(move || model.stop()).await?;
    }
    outcome
}

struct Chat {
    backend: Backend,
    sampling: Sampling,
    system: Option<String>,
    /// Messages in OpenAI's shape, without the system's.
    turns: Vec<Value>,
    is_interactive: bool,
    signals: StopSignals,
}

#[derive(Clone, Copy)]
struct Sampling {
    temperature: f32,
    max_tokens: Option<u32>,
    seed: Option<u64>,
}

/// What a line asks for.
enum Turn {
    Say(String),
    Done,
    Leave,
}

impl Chat {
    async fn converse(&mut self, lines: &mut Lines) -> anyhow::Result<()> {
        while let Some(line) = lines.next(&mut self.signals).await? {
            match self.command(&line)? {
                Turn::Leave => break,
                Turn::Done => {}
                Turn::Say(text) => {
                    self.turns.push(json!({"role": "user", "content": text}));
                    match self.answer().await {
                        Ok(Spoken { text, end: End::Terminated }) => {
                            drop(text);
                            return Err(Interrupted.into());
                        }
                        Ok(Spoken { text, .. }) => self.turns.push(json!({"role": "assistant", "content": text})),
                        Err(error) if self.is_interactive => {
                            // The turn is taken back, so that it can be said again.
                            self.turns.pop();
                            crate::failure::report(&error);
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }

    fn command(&mut self, line: &str) -> anyhow::Result<Turn> {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match word {
            "" => {}
            "/help" | "/?" => eprint!("{HELP}"),
            "/quit" | "/exit" | "/bye" => return Ok(Turn::Leave),
            "/clear" => {
                self.turns.clear();
                eprintln!("forgotten");
            }
            "/system" => self.system = (!rest.is_empty()).then(|| rest.to_owned()),
            "/save" if rest.is_empty() => eprintln!("/save needs the name of a file"),
            "/save" => {
                let text = serde_json::to_string_pretty(&self.messages())?;
                match std::fs::write(rest, text + "\n") {
                    Ok(()) => eprintln!("saved to {rest}"),
                    Err(error) => eprintln!("cannot write {rest}: {error}"),
                }
            }
            _ if word.starts_with('/') => eprintln!("{word} is no command; /help lists them"),
            _ => return Ok(Turn::Say(line.to_owned())),
        }
        Ok(Turn::Done)
    }

    fn messages(&self) -> Vec<Value> {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        system.chain(self.turns.iter().cloned()).collect()
    }

    /// Streams one answer to stdout.
    async fn answer(&mut self) -> anyhow::Result<Spoken> {
        if self.is_interactive {
            // It was meant for the answer before this one, and came when that had ended.
            self.signals.forget_interrupt();
        }
        let (messages, started) = (self.messages(), Instant::now());
        let (mut text, mut num_tokens, mut first) = (String::new(), 0usize, None);
        let mut write_error = None;
        let finished = {
            let mut speak = |piece: &str, tokens: usize| {
                num_tokens += tokens;
                if !piece.is_empty() {
                    first.get_or_insert_with(Instant::now);
                    text.push_str(piece);
                    if let Err(error) = terminal::print(piece) {
                        write_error.get_or_insert(error);
                    }
                }
            };
            let answering = self.backend.answer(messages, self.sampling, &mut speak);
            tokio::select! {
                biased;
                signal = self.signals.next() => Err(signal),
                outcome = answering => Ok(outcome?),
            }
        };
        if let Some(error) = write_error {
            return Err(error.into());
        }
        terminal::print(if self.is_interactive { "\n\n" } else { "\n" })?;
        let style = Style::for_stderr();
        let end = match finished {
            Err("SIGTERM") => End::Terminated,
            Err(_) if !self.is_interactive => End::Terminated,
            Err(_) => {
                eprintln!("{}", style.dim("[stopped]"));
                End::Stopped
            }
            Ok(()) => End::Complete,
        };
        if self.is_interactive
            && let Some(first) = first
        {
            let speed =
                num_tokens.saturating_sub(1) as f64 / first.elapsed().max(Duration::from_millis(1)).as_secs_f64();
            let wait = first.duration_since(started).as_secs_f64();
            eprintln!(
                "{}",
                style.dim(&format!("[{num_tokens} tokens, first after {wait:.2} s, then {speed:.0} a second]"))
            );
        }
        Ok(Spoken { text, end })
    }
}

struct Spoken {
    text: String,
    end: End,
}

enum End {
    Complete,
    /// By ctrl-c: what was said stays in the conversation.
    Stopped,
    /// The program is to end.
    Terminated,
}

enum Backend {
    Local { model: Arc<LocalModel>, name: String, adapter: Option<AdapterLease> },
    Remote { client: Client, model: String },
}

impl Backend {
    async fn open(args: &ChatArgs) -> anyhow::Result<Self> {
        if let Some(url) = &args.url {
            let client = Client::new(url, args.api_key.as_deref())?;
            let model = match &args.model {
                Some(model) => model.clone(),
                None => client.first_model().await.map_err(|error| explain(&error))?,
            };
            return Ok(Self::Remote { client, model });
        }
        let settings = ModelSettings::new(args.model.clone().or_else(model_from_environment), &args.engine)?;
        let given = AdapterArgs { adapter: args.adapter.iter().cloned().collect(), ..AdapterArgs::default() };
        let adapters = AdapterSettings::resolve(&given, FileTables::default(), None, &settings.local.adapters)?;
        let files = local::fetch(&settings, LogFormat::Text).await?;
        let (options, progress) = (local::fetch_options(&settings)?, Arc::new(FetchProgress::default()));
        adapters.fetch(&options, &(progress as SharedProgress)).await?;
        let (model, report) = local::load(&files, &settings.local, LogFormat::Text).await?;
        report.notes.iter().for_each(|note| terminal::note(note));
        // It was given no folders.
        let _none = adapters.install(&model.adapters, &options, Arc::new(|_| false)).await?;
        let (mut name, mut adapter) = (files.name, None);
        if let Some(arg) = &args.adapter {
            name = format!("{name} through {}", arg.name);
            adapter = Some(model.adapters.acquire(&arg.name, None).await?);
        }
        Ok(Self::Local { model, name, adapter })
    }

    fn describe(&self) -> String {
        match self {
            Self::Local { model, name, .. } => {
                format!("{name} in this process ({}, {} threads)", model.info.device, model.info.threads)
            }
            Self::Remote { client, model } => format!("{model} at {}", client.url()),
        }
    }

    /// Calls `speak` with each piece of text and the tokens it stands for.
    async fn answer(
        &self,
        messages: Vec<Value>,
        sampling: Sampling,
        speak: &mut (dyn FnMut(&str, usize) + Send),
    ) -> anyhow::Result<()> {
        match self {
            Self::Local { model, adapter, .. } => {
                let text = model.render_chat(&RenderRequest {
                    messages,
                    add_generation_prompt: true,
                    ..RenderRequest::default()
                })?;
                let mut prepared = model.prepare(text_request(text, sampling)).await?;
                if let Some(adapter) = adapter {
                    prepared.set_adapter(adapter.clone());
                }
                let mut streams = model.submit_all(vec![prepared]).await?;
                let mut stream = streams.pop().expect("each request has its stream");
                while let Some(event) = stream.next().await {
                    if let TextEvent::Delta { text, num_tokens, .. } = event? {
                        speak(&text, num_tokens);
                    }
                }
            }
            Self::Remote { client, model } => {
                let mut body = json!({
                    "model": model, "messages": messages, "stream": true, "temperature": sampling.temperature,
                });
                if let Some(max_tokens) = sampling.max_tokens {
                    body["max_tokens"] = json!(max_tokens);
                }
                if let Some(seed) = sampling.seed {
                    body["seed"] = json!(seed);
                }
                let mut stream =
                    std::pin::pin!(client.stream("chat/completions", &body).await.map_err(|error| explain(&error))?);
                while let Some(chunk) = stream.next().await {
                    let chunk = chunk.map_err(|error| explain(&error))?;
                    speak(&chunk.text, usize::from(!chunk.text.is_empty()));
                }
            }
        }
        Ok(())
    }
}

fn text_request(text: String, sampling: Sampling) -> TextRequest {
    TextRequest {
        request_id: "chat".to_owned(),
        prompt_param: "messages",
        params: SamplingParams { temperature: sampling.temperature, seed: sampling.seed, ..SamplingParams::default() },
        max_tokens: sampling.max_tokens.map(|tokens| tokens as usize),
        ..TextRequest::new(Prompt::Text { text, add_special_tokens: false })
    }
}

/// A client's error with its next step.
fn explain(error: &ClientError) -> Failure {
    let hint = match error {
        ClientError::Connect { .. } => Some("start a server with `bindery serve`, or check --url"),
        ClientError::Refused { status: 401 | 403, .. } => {
            Some("give the server's key with --api-key or BINDERY_API_KEY")
        }
        ClientError::Refused { status: 400, .. } => {
            Some("a conversation that has grown too long is forgotten with /clear")
        }
        _ => None,
    };
    let failure = Failure::new(error.to_string());
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// Where turns come from. Reading blocks, so it happens on a thread of its own.
enum Lines {
    Typed { editor: Option<Box<DefaultEditor>>, history: Option<PathBuf> },
    Piped { num_read: usize },
}

impl Lines {
    fn open(is_interactive: bool) -> anyhow::Result<Self> {
        if !is_interactive {
            return Ok(Self::Piped { num_read: 0 });
        }
        let mut editor = DefaultEditor::new()?;
        let history = FetchOptions::from_env(true).ok().map(|options| options.cache_dir.join("chat-history"));
        if let Some(history) = &history {
            // Absent the first time.
            let _ = editor.load_history(history);
        }
        Ok(Self::Typed { editor: Some(Box::new(editor)), history })
    }

    /// The next line; None at the end of input.
    async fn next(&mut self, signals: &mut StopSignals) -> anyhow::Result<Option<String>> {
        match self {
            Self::Typed { editor, history } => loop {
                // Gone where a signal ended the last call: there it still reads.
                let Some(mut taken) = editor.take() else { return Err(Interrupted.into()) };
                let (before, shown) = (Mode::now(), CancellationToken::new());
                let prompt = TypedPrompt(shown.clone());
                let mut read = tokio::task::spawn_blocking(move || {
                    let line = taken.readline(&prompt);
                    (taken, line)
                });
                let (mut returned, line) = tokio::select! {
                    biased;
                    read = &mut read => read?,
                    () = signals.terminated() => {
                        // An editor that is about to begin would change the terminal after us; one that has begun leaves
                        // it as it is until there is a line.
                        tokio::select! {
                            () = shown.cancelled() => {}
                            _ = &mut read => {}
                        }
                        before.restore();
                        return Err(Interrupted.into());
                    }
                };
                if let Ok(line) = &line {
                    remember(&mut returned, line, history.as_deref());
                }
                *editor = Some(returned);
                match line {
                    Ok(line) => return Ok(Some(line)),
                    Err(ReadlineError::Interrupted) => eprintln!("{}", Style::for_stderr().dim("ctrl-d leaves")),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error.into()),
                }
            },
            Self::Piped { num_read } => {
                *num_read += 1;
                let number = *num_read;
                let read = tokio::task::spawn_blocking(|| {
                    let mut line = Vec::new();
                    std::io::stdin().lock().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line)?;
                    std::io::Result::Ok(line)
                });
                let line = signals.unless_stopped(read).await.ok_or(Interrupted)??.context("cannot read the input")?;
                Ok(piped_line(line, number)?)
            }
        }
    }
}

/// What a typed line stands behind. Tells when it is shown, which the editor does once the terminal is in its own mode.
struct TypedPrompt(CancellationToken);

impl rustyline::Prompt for TypedPrompt {
    fn raw(&self) -> &'static str {
        self.0.cancel();
        "> "
    }
}

/// Into the history, and that to its file: a signal may end the program while the editor still reads. A line that is not
/// remembered can still be answered.
fn remember(editor: &mut DefaultEditor, line: &str, history: Option<&Path>) {
    if line.trim().is_empty() {
        return;
    }
    let _ = editor.add_history_entry(line);
    if let Some(history) = history {
        if let Some(folder) = history.parent() {
            let _ = std::fs::create_dir_all(folder);
        }
        let _ = editor.save_history(history);
    }
}

/// A line of piped input, counted from 1, as a text; None at the end of input.
fn piped_line(line: Vec<u8>, number: usize) -> Result<Option<String>, Failure> {
    if line.len() as u64 > MAX_LINE_BYTES {
        return Err(Failure::new(format!("line {number} of the input has more than {MAX_LINE_BYTES} bytes"))
            .hint("a line is a turn: break it up, or send it to a server's /v1/chat/completions"));
    }
    match String::from_utf8(line) {
        Ok(text) => Ok((!text.is_empty()).then_some(text)),
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            Err(Failure::new(format!(
                "line {number} of the input is not UTF-8: byte {:#04x} at its place {} begins no character",
                error.as_bytes()[at],
                at + 1
            ))
            .hint("convert it first, for example with iconv"))
        }
    }
}
