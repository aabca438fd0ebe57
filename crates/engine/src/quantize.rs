//! `bindery quantize`: a model's folder made smaller ahead of time, with its tokenizer beside the weights.
//!
//! A text may calibrate it: the model runs over it in f32, and errors of weights are weighed by what was multiplied with
//! them. Everything is made in a temporary folder beside the target, opened again as a check, and renamed. It must not know
//! how groups are quantised or what is printed. Its invariant: the target is whole or not there.

use std::{
    fs, io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bindery_model::{
    BackendKind, LoadOptions, Model, Quantize,
    threads::physical_cores,
    weights::{CheckpointRequest, Importance, QuantizedReport, WeightStore, is_dense_source, write_checkpoint},
};

use crate::{EngineError, load, perplexity, text::export};

/// What to make of what.
#[derive(Clone, Copy, Debug)]
pub struct QuantizeRequest<'a> {
    /// A `.gguf` file, or a folder with config.json and safetensors; dense.
    pub source: &'a Path,
    /// A folder that is not there yet.
    pub target: &'a Path,
    /// Int8 or Int4.
    pub quantize: Quantize,
    /// Over all weights, scales counted: each matrix gets the format that suits it. None: what `quantize` makes of it.
    pub bits_per_weight: Option<f64>,
    /// Weighs errors by what goes into each matrix.
    pub calibration: Option<Calibration<'a>>,
    /// None: physical cores.
    pub threads: Option<usize>,
}

/// What to run the model over.
#[derive(Clone, Copy, Debug)]
pub struct Calibration<'a> {
    /// Like what the model will be used for.
    pub text: &'a str,
    /// Tokens of a window.
    pub context_len: usize,
    /// Windows; `None`: all there are.
    pub max_windows: Option<usize>,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Weights are being read for calibration, bytes.
    Loading {
        /// So far.
        done: u64,
        /// In all.
        total: u64,
    },
    /// Windows of the text.
    Calibrating {
        /// So far.
        done: usize,
        /// In all.
        total: usize,
    },
    /// Weights.
    Quantizing {
        /// So far.
        done: u64,
        /// In all.
        total: u64,
    },
}

/// What came out.
#[derive(Clone, Debug)]
pub struct QuantizeOutcome {
    /// Sizes and errors by group.
    pub report: QuantizedReport,
    /// None without calibration.
    pub calibration_time: Option<Duration>,
    /// Quantising and writing.
    pub quantize_time: Duration,
}

/// Makes the folder. `progress` may end it; nothing is left then.
///
/// # Errors
/// A target that is there; a source that is quantised already, or cannot be read; a text too short to calibrate with; what
/// the system refuses, such as a full disk.
pub fn quantize(
    request: &QuantizeRequest<'_>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<QuantizeOutcome, EngineError> {
    refuse_existing(request.target)?;
    let store = WeightStore::open(request.source)?;
    is_dense_source(&store)?;
    // A model whose text side cannot be read would not load.
    let (tokenizer, _) = load::load_text(request.source, false)?;
    let unfinished = temporary_folder(request.target)?;
    let start = Instant::now();
    let importance = match request.calibration {
        None => None,
        Some(calibration) => Some(calibrate(request, calibration, &tokenizer, progress)?),
    };
    let calibration_time = importance.is_some().then(|| start.elapsed());
    drop(tokenizer);
    let start = Instant::now();
    match store.gguf() {
        Some(file) => export::write_files(file, unfinished.path())?,
        None => export::copy_files(request.source, unfinished.path())?,
    }
    let threads = request.threads.unwrap_or_else(physical_cores);
    let mut quantizing = |done, total| progress(Progress::Quantizing { done, total });
    let how = CheckpointRequest {
        quantize: request.quantize,
        bits_per_weight: request.bits_per_weight,
        importance: importance.as_ref(),
        threads,
    };
    let report = write_checkpoint(&store, unfinished.path(), how, &mut quantizing)?;
    check(unfinished.path(), &store)?;
    finish(unfinished, request.target)?;
    Ok(QuantizeOutcome { report, calibration_time, quantize_time: start.elapsed() })
}

fn refuse_existing(target: &Path) -> Result<(), EngineError> {
    match fs::symlink_metadata(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(EngineError::Text(format!("cannot look at {}: {error}", target.display()))),
        Ok(_) => Err(EngineError::Invalid {
            param: "out",
            message: format!(
                "{} is there already, and nothing is overwritten: name another, or remove it",
                target.display()
            ),
        }),
    }
}

/// Beside the target, so that a rename is all that is left to do; removed when it is dropped.
fn temporary_folder(target: &Path) -> Result<tempfile::TempDir, EngineError> {
    let parent = parent(target);
    let name = target.file_name().map(|name| name.to_string_lossy().into_owned());
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        let message = format!("{} names no folder to make", target.display());
        return Err(EngineError::Invalid { param: "out", message });
    };
    let folder = tempfile::Builder::new().prefix(&format!(".{name}.unfinished-")).tempdir_in(&parent);
    folder.map_err(|error| EngineError::Text(format!("cannot make a folder in {}: {error}", parent.display())))
}

fn parent(target: &Path) -> PathBuf {
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// The folder opens as the model it was made of.
fn check(folder: &Path, source: &WeightStore) -> Result<(), EngineError> {
    let made = WeightStore::open(folder)?;
    if made.config() != source.config() {
        let what = format!("{} describes another model than its source: this is an error of ours", folder.display());
        return Err(EngineError::Text(what));
    }
    load::load_text(folder, false)?;
    Ok(())
}

fn finish(unfinished: tempfile::TempDir, target: &Path) -> Result<(), EngineError> {
    refuse_existing(target)?;
    let cannot = |error: io::Error| EngineError::Text(format!("cannot put {} in place: {error}", target.display()));
    // Folders made for one user's eyes become what any other folder of theirs is.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = fs::metadata(unfinished.path().join("config.json")).map_err(cannot)?.permissions().mode();
        let searchable = mode | (mode & 0o444) >> 2;
        fs::set_permissions(unfinished.path(), fs::Permissions::from_mode(searchable)).map_err(cannot)?;
    }
    fs::rename(unfinished.path(), target).map_err(cannot)?;
    // Nothing is left to remove.
    let _ = unfinished.keep();
    #[cfg(unix)]
    fs::File::open(parent(target)).and_then(|folder| folder.sync_all()).map_err(cannot)?;
    Ok(())
}

/// Mean squares of what goes into each matrix, over the text in f32.
fn calibrate(
    request: &QuantizeRequest<'_>,
    calibration: Calibration<'_>,
    tokenizer: &crate::Tokenizer,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Importance, EngineError> {
    let model = Model::open(request.source, &LoadOptions::new(BackendKind::Reference))?;
    let context_len = calibration.context_len.min(model.config().max_position_embeddings);
    let windows = perplexity::Windows::cut(tokenizer, calibration.text, context_len, calibration.max_windows)?;
    windows.check_vocabulary(model.config().vocab_size)?;
    let mut model = model.load(&mut |done, total| {
        let _ = progress(Progress::Loading { done, total });
    })?;
    model.observe_inputs()?;
    let mut scorer = perplexity::Scorer::new(model, context_len, context_len)?;
    for (index, window) in windows.iter().enumerate() {
        scorer.run(window)?;
        if progress(Progress::Calibrating { done: index + 1, total: windows.len() }).is_break() {
            return Err(EngineError::Text("calibrating was stopped".to_owned()));
        }
    }
    let gathered = scorer.into_model().take_importance();
    gathered.ok_or_else(|| EngineError::Text("nothing was gathered: this is an error of ours".to_owned()))
}
