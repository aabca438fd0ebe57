//! Writes a model's tensors as a safetensors folder whose matrices are quantised: `config.json` and `model.safetensors`.
//!
//! Sizes follow from shapes and formats, so the header is written first and the tensors after it, one at a time: memory
//! holds one quantised matrix. Every role becomes a tensor of its own (fused projections and stacked experts are taken
//! apart), under the name that transformers gives it. It must not know tokenizers or where the folder will end up. Its
//! invariant: `config.json` comes last, so a folder that was not finished does not load.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufWriter, Write},
    ops::{ControlFlow, Range},
    path::Path,
};

use bindery_kernels::QuantFormat;
use half::f16;
use serde_json::{Map, Value, json};

use super::{CODES, MINS, RowBuffers, RowSizes, SCALES, SUB_BITS, SUB_MINS, SUB_SCALES, mix, push_bits, push_codes};
use crate::{
    ModelError, Quantize,
    config::of_decoder,
    weights::{
        CONFIG_FILE, Importance, LayerTensor, Source, TensorRole, TensorView, WeightFormat, WeightStore,
        import::lost_squares,
        mmap::read_text,
        names::{Naming, TensorKind, expected},
        quantize::{Effort, RowQuantizer},
        safetensors::SINGLE_FILE,
    },
};

/// Bytes that are collected before they are written.
const BUFFER_BYTES: usize = 1 << 20;

/// Some of a model's weights that go together: what they took before and take now.
#[derive(Clone, Debug, Default)]
pub struct QuantizedGroup {
    /// "embedding", "attention", "mlp", "experts", "head", "norms, biases and routers".
    pub name: &'static str,
    /// What its tensors are stored as, e.g. "int4, int8".
    pub formats: String,
    /// Weights.
    pub num_parameters: u64,
    /// With scales and minimums.
    pub num_bytes: u64,
    /// Sum of squared differences to the source's weights, over the sum of their squares; none where nothing was quantised.
    pub relative_error: Option<f64>,
}

impl QuantizedGroup {
    /// Scales counted.
    pub fn bits_per_weight(&self) -> f64 {
        self.num_bytes as f64 * 8.0 / self.num_parameters.max(1) as f64
    }
}

/// What a folder came to hold.
#[derive(Clone, Debug)]
pub struct QuantizedReport {
    /// Those with weights.
    pub groups: Vec<QuantizedGroup>,
    /// The sum of them.
    pub total: QuantizedGroup,
    /// Bytes of the same tensors in the source.
    pub source_bytes: u64,
}

/// An error where a matrix is quantised already: rounding twice loses more than rounding once.
pub fn is_dense_source(store: &WeightStore) -> Result<(), ModelError> {
    let is_quantized = |role: TensorRole| -> Result<bool, ModelError> {
        Ok(store.tensor(role)?.is_some_and(|tensor| !tensor.format.is_dense()))
    };
    for tensor in expected(store.config()) {
        if is_quantized(tensor.role)? {
            let formats = store.describe_formats();
            let what = format!(
                "its weights are quantised already ({formats}); quantise the model as it was published, in f32, f16 or bf16"
            );
            return Err(ModelError::unsupported(store.path(), what));
        }
    }
    Ok(())
}

/// How a folder is written.
#[derive(Clone, Copy, Debug)]
pub struct CheckpointRequest<'a> {
    /// Int8 or Int4.
    pub quantize: Quantize,
    /// With it, each matrix gets the format that suits it, in so many bits a weight over all tensors, scales counted.
    pub bits_per_weight: Option<f64>,
    /// Weighs the errors; without it and without
    /// bits that were asked for, what the folder loads as is bit for bit what [`TensorView::import`] makes of the source.
    pub importance: Option<&'a Importance>,
    /// Threads that quantise.
    pub threads: usize,
}

/// Writes `store` into the folder `directory`, which is there and empty. `progress(weights done, weights in all)` is called
/// after each tensor and may end it.
///
/// # Errors
/// A source that is quantised already or has nothing to quantise; fewer bits than the smallest formats take; weights that are not finite or too large for f16 scales;
/// what the system refuses, such as a full disk.
pub fn write_checkpoint(
    store: &WeightStore,
    directory: &Path,
    request: CheckpointRequest<'_>,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<QuantizedReport, ModelError> {
    let CheckpointRequest { quantize, bits_per_weight, importance, threads } = request;
    is_dense_source(store)?;
    let mut plan = plan(store, quantize)?;
    if !plan.iter().any(|planned| matches!(planned.form, Form::Quantized(_))) {
        let what = "none of its matrices can be quantised: their inputs are no multiple of 32";
        return Err(ModelError::unsupported(store.path(), what));
    }
    let path = directory.join(SINGLE_FILE);
    let file = File::create_new(&path).map_err(|error| cannot_write(&path, &error))?;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
    let mut tally = Tally::default();
    let total = plan.iter().map(|planned| planned.view.num_elements()).sum();
    let mut done = 0;
    let mut stopped = progress(done, total).is_break();
    if let Some(bits) = bits_per_weight {
        let mix = mix::Mix { bits_per_weight: bits, threads };
        mix::choose(&mut plan, store, mix, &mut || stopped || progress(0, total).is_break())?;
    }
    let mut write = || -> Result<(), ModelError> {
        out.write_all(&header(&plan)).map_err(|error| cannot_write(&path, &error))?;
        for planned in &plan {
            if stopped {
                return Err(ModelError::Step("quantising was stopped".to_owned()));
            }
            let importance = importance.and_then(|importance| importance.mean_squares(planned.role));
            let parts = planned.make(importance.as_deref(), threads)?;
            parts.write(&mut out).map_err(|error| cannot_write(&path, &error))?;
            tally.add(planned, &parts);
            done += planned.view.num_elements();
            stopped = progress(done, total).is_break();
        }
        out.flush().and_then(|()| out.get_ref().sync_all()).map_err(|error| cannot_write(&path, &error))
    };
    write()?;
    let config = config_json(store, &request)?;
    let path = directory.join(CONFIG_FILE);
    write_synced(&path, format!("{config:#}\n").as_bytes()).map_err(|error| cannot_write(&path, &error))?;
    Ok(tally.report(store.num_bytes()))
}

fn cannot_write(path: &Path, error: &io::Error) -> ModelError {
    let hint = if error.kind() == io::ErrorKind::StorageFull { ": free space, or name another place" } else { "" };
    ModelError::Step(format!("cannot write {}: {error}{hint}", path.display()))
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// The source's own, or one made of the decoder's description, with what was done to the weights.
fn config_json(store: &WeightStore, request: &CheckpointRequest<'_>) -> Result<Value, ModelError> {
    let mut config = match &store.source {
        Source::Safetensors(_) => {
            let path = store.path().join(CONFIG_FILE);
            let text = read_text(&path, crate::config::MAX_CONFIG_BYTES)?;
            let wrong = |error| ModelError::bad_file(&path, format!("not valid JSON: {error}"));
            let mut config: Value = serde_json::from_str(&text).map_err(wrong)?;
            // A file may have a head of its own although the config ties it.
            config["tie_word_embeddings"] = store.config().tied_embeddings.into();
            config
        }
        Source::Gguf(_) | Source::Dummy => of_decoder(store.config()).map_err(ModelError::Step)?,
    };
    config["quantization_config"] = json!({
        "quant_method": "bindery",
        "version": 1,
        "quantize": if request.quantize == Quantize::Int8 { "int8" } else { "int4" },
        "calibrated": request.importance.is_some(),
    });
    if let Some(bits) = request.bits_per_weight {
        config["quantization_config"]["bits_per_weight"] = bits.into();
    }
    Ok(config)
}

/// How a tensor is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Quantized(QuantFormat),
    /// As stored.
    Dense,
    /// In f32.
    Vector,
}

pub(super) struct Planned<'a> {
    pub(super) role: TensorRole,
    name: String,
    pub(super) view: TensorView<'a>,
    pub(super) form: Form,
}

fn plan(store: &WeightStore, quantize: Quantize) -> Result<Vec<Planned<'_>>, ModelError> {
    let config = store.config();
    let naming = match &store.source {
        Source::Safetensors(checkpoint) => Naming::hugging_face(config, |name| checkpoint.entries.contains_key(name)),
        Source::Gguf(_) | Source::Dummy => Naming::hugging_face(config, |_| false),
    };
    let mut plan = Vec::new();
    for tensor in expected(config) {
        // What the config calls for was found when the store opened.
        let Some(view) = store.tensor(tensor.role)? else { continue };
        let form = match (tensor.kind, view.quantized_by(quantize)) {
            (TensorKind::Vector, _) => Form::Vector,
            (TensorKind::Matrix, Some(format)) => Form::Quantized(format),
            (TensorKind::Matrix, None) => Form::Dense,
        };
        // The first place is a tensor of the role's own.
        let name = naming.places(config, &tensor).swap_remove(0).name;
        plan.push(Planned { role: tensor.role, name, view, form });
    }
    Ok(plan)
}

impl Planned<'_> {
    pub(super) fn num_bytes(&self) -> u64 {
        self.tensors().iter().map(|&(_, _, _, bytes)| bytes as u64).sum()
    }

    /// Suffix, dtype, shape and bytes of each tensor it becomes.
    fn tensors(&self) -> Vec<(&'static str, &'static str, Vec<usize>, usize)> {
        let TensorView { rows, cols, format, .. } = self.view;
        let dense = |dtype, shape: Vec<usize>, size: usize| {
            let bytes = shape.iter().product::<usize>() * size;
            vec![("", dtype, shape, bytes)]
        };
        match self.form {
            Form::Vector => dense("F32", vec![cols], 4),
            Form::Dense => match format {
                WeightFormat::F16 => dense("F16", vec![rows, cols], 2),
                WeightFormat::Bf16 => dense("BF16", vec![rows, cols], 2),
                _ => dense("F32", vec![rows, cols], 4),
            },
            Form::Quantized(format) => {
                let RowSizes { code_bytes, scales, mins, sub_scale_bytes, sub_min_bytes } = RowSizes::new(format, cols);
                let parts = [
                    (CODES, "U8", code_bytes, 1),
                    (SCALES, "F16", scales, 2),
                    (MINS, "F16", mins, 2),
                    (SUB_SCALES, "U8", sub_scale_bytes, 1),
                    (SUB_MINS, "U8", sub_min_bytes, 1),
                ];
                let there = parts.into_iter().filter(|&(_, _, per_row, _)| per_row > 0);
                there.map(|(suffix, dtype, n, size)| (suffix, dtype, vec![rows, n], rows * n * size)).collect()
            }
        }
    }

    fn make(&self, importance: Option<&[f32]>, threads: usize) -> Result<Parts, ModelError> {
        match self.form {
            Form::Vector => {
                let bytes = self.view.to_f32()?.iter().flat_map(|value| value.to_le_bytes()).collect();
                Ok(Parts { chunks: vec![Chunk { codes: bytes, ..Chunk::default() }] })
            }
            Form::Dense => self.dense(),
            Form::Quantized(format) => {
                let effort = if importance.is_some() { Effort::Thorough } else { Effort::Search };
                let quantizer = RowQuantizer::new(format, importance, effort);
                let rows = self.view.rows;
                let rows_each = rows.div_ceil(threads.max(1));
                let pieces: Vec<_> =
                    (0..rows).step_by(rows_each).map(|start| start..(start + rows_each).min(rows)).collect();
                let chunks = Chunk::quantized_each(&self.view, &pieces, &quantizer, threads);
                self.view.release();
                let chunks = chunks?;
                let sum = |of: fn(&Chunk) -> f64| chunks.iter().map(of).sum();
                self.view.check_lost(sum(|chunk| chunk.lost), sum(|chunk| chunk.squared))?;
                Ok(Parts { chunks })
            }
        }
    }

    /// As stored, but checked.
    fn dense(&self) -> Result<Parts, ModelError> {
        let values = self.view.to_f32()?;
        let bytes = match self.view.format {
            WeightFormat::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
            WeightFormat::Bf16 => values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        };
        Ok(Parts { chunks: vec![Chunk { codes: bytes, ..Chunk::default() }] })
    }
}

/// The header of a safetensors file: its length, then JSON, filled up so that the data begins at a multiple of eight.
fn header(plan: &[Planned<'_>]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({"format": "bindery"}));
    let mut start = 0;
    for planned in plan {
        for (suffix, dtype, shape, bytes) in planned.tensors() {
            let end = start + bytes;
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            entries.insert(format!("{}{suffix}", planned.name), entry);
            start = end;
        }
    }
    let mut json = Value::Object(entries).to_string();
    while !json.len().is_multiple_of(8) {
        json.push(' ');
    }
    [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat()
}

/// A tensor as it is written: of each part, the rows of one thread after those of another.
struct Parts {
    chunks: Vec<Chunk>,
}

impl Parts {
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let parts: [fn(&Chunk) -> &[u8]; 5] = [
            |chunk| &chunk.codes,
            |chunk| &chunk.scales,
            |chunk| &chunk.mins,
            |chunk| &chunk.sub_scales,
            |chunk| &chunk.sub_mins,
        ];
        parts.iter().try_for_each(|part| self.chunks.iter().try_for_each(|chunk| out.write_all(part(chunk))))
    }
}

/// Some rows.
#[derive(Default)]
pub(super) struct Chunk {
    /// Or the bytes of what is not quantised.
    codes: Vec<u8>,
    scales: Vec<u8>,
    mins: Vec<u8>,
    sub_scales: Vec<u8>,
    sub_mins: Vec<u8>,
    pub(super) squared_error: f64,
    pub(super) squared: f64,
    /// Part of `squared` that scales of 0 cost.
    lost: f64,
}

impl Chunk {
    /// One for each of `pieces` of the rows, in their order, on so many threads.
    pub(super) fn quantized_each(
        view: &TensorView<'_>,
        pieces: &[Range<usize>],
        quantizer: &RowQuantizer,
        threads: usize,
    ) -> Result<Vec<Self>, ModelError> {
        let work = |pieces: &[Range<usize>]| -> Result<Vec<Self>, ModelError> {
            pieces.iter().map(|rows| Self::quantized(view, rows.clone(), quantizer)).collect()
        };
        let work = &work;
        std::thread::scope(|scope| {
            let share = pieces.len().div_ceil(threads.max(1)).max(1);
            let started: Vec<_> = pieces.chunks(share).map(|pieces| scope.spawn(move || work(pieces))).collect();
            let joined = started.into_iter().map(|thread| match thread.join() {
                Ok(chunks) => chunks,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            Ok(joined.collect::<Result<Vec<_>, ModelError>>()?.into_iter().flatten().collect())
        })
    }

    fn quantized(view: &TensorView<'_>, rows: Range<usize>, quantizer: &RowQuantizer) -> Result<Self, ModelError> {
        let mut chunk = Self::default();
        let mut dequantized = vec![0.0; view.cols];
        view.quantize_rows(rows, quantizer, |values, row| {
            chunk.push(quantizer.format, row);
            chunk.lost += lost_squares(values, &row.scales);
            row.dequantize(quantizer.format, &mut dequantized);
            let pairs = || values.iter().zip(&dequantized);
            chunk.squared_error += pairs().map(|(value, rounded)| f64::from(value - rounded).powi(2)).sum::<f64>();
            chunk.squared += values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
        })?;
        Ok(chunk)
    }

    fn push(&mut self, format: QuantFormat, row: &RowBuffers) {
        push_codes(format, &row.codes, &mut self.codes);
        self.scales.extend(row.scales.iter().flat_map(|scale| scale.to_le_bytes()));
        self.mins.extend(row.mins.iter().flat_map(|min| min.to_le_bytes()));
        for (subs, out) in [(&row.sub_scales, &mut self.sub_scales), (&row.sub_mins, &mut self.sub_mins)] {
            subs.as_chunks::<8>().0.iter().for_each(|&subs| push_bits(SUB_BITS, subs.map(i8::cast_unsigned), out));
        }
    }
}

/// Sums by group.
#[derive(Default)]
struct Tally {
    groups: Vec<(QuantizedGroup, BTreeSet<String>, [f64; 2])>,
}

impl Tally {
    fn add(&mut self, planned: &Planned<'_>, parts: &Parts) {
        let name = match planned.form {
            Form::Quantized(_) => group_of(planned.role),
            Form::Dense | Form::Vector => "norms, biases, routers",
        };
        let format = match planned.form {
            Form::Quantized(format) => describe(format),
            Form::Dense => planned.view.format.to_string().to_lowercase(),
            Form::Vector => "f32".to_owned(),
        };
        let index = self.groups.iter().position(|(group, ..)| group.name == name).unwrap_or_else(|| {
            self.groups.push((QuantizedGroup { name, ..QuantizedGroup::default() }, BTreeSet::new(), [0.0; 2]));
            self.groups.len() - 1
        });
        let (group, formats, sums) = &mut self.groups[index];
        group.num_parameters += planned.view.num_elements();
        group.num_bytes += planned.num_bytes();
        formats.insert(format);
        for chunk in &parts.chunks {
            sums[0] += chunk.squared_error;
            sums[1] += chunk.squared;
        }
    }

    fn report(self, source_bytes: u64) -> QuantizedReport {
        let relative = |[error, squared]: [f64; 2]| (squared > 0.0).then(|| error / squared);
        let mut total = QuantizedGroup { name: "all", ..QuantizedGroup::default() };
        let mut sums = [0.0; 2];
        let mut groups = Vec::new();
        for (group, formats, of_group) in self.groups {
            total.num_parameters += group.num_parameters;
            total.num_bytes += group.num_bytes;
            sums = [sums[0] + of_group[0], sums[1] + of_group[1]];
            let formats = formats.into_iter().collect::<Vec<_>>().join(", ");
            groups.push(QuantizedGroup { formats, relative_error: relative(of_group), ..group });
        }
        total.relative_error = relative(sums);
        QuantizedReport { groups, total, source_bytes }
    }
}

fn group_of(role: TensorRole) -> &'static str {
    use LayerTensor as T;
    match role {
        TensorRole::Embedding => "embedding",
        TensorRole::Head => "head",
        TensorRole::Layer(_, T::Q | T::K | T::V | T::O) => "attention",
        TensorRole::Layer(_, T::ExpertGate(_) | T::ExpertUp(_) | T::ExpertDown(_)) => "experts",
        _ => "mlp",
    }
}

/// "int4", with what else tells formats of as many bits apart.
fn describe(format: QuantFormat) -> String {
    let scales = if format.has_sub_scales() { " (two-level scales)" } else { "" };
    format!("int{}{scales}", format.bits.count())
}
