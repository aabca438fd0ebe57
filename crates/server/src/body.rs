//! Bytes to typed requests: the body limit, JSON with errors that name the field, and the names of fields nobody read.
//!
//! Invariant: a body is never held beyond its limit, a large one is never parsed on an async thread, and whatever is
//! wrong with it is a 400 (or 408, 413, 415), in words.

use std::{error::Error as _, fmt::Write as _, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::{FromRequest, Request},
    http::{HeaderMap, HeaderName, HeaderValue, header},
};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{
    config::Limits,
    context::RequestContext,
    error::{ApiError, quote, shorten},
    state::{Job, SharedState},
};

/// Names of ignored fields that are kept for the warning.
const MAX_IGNORED_FIELDS: usize = 32;
/// Of arrays and objects: serde_json's own bound.
const MAX_NESTING: usize = 127;
/// Longest name of an ignored field in the warning.
const MAX_FIELD_CHARS: usize = 64;

const X_REQUEST_TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout");
const X_BINDERY_WARNING: HeaderName = HeaderName::from_static("x-bindery-warning");

/// A JSON request.
pub(crate) struct ApiJson<T> {
    pub(crate) value: T,
    pub(crate) warnings: Warnings,
    /// From `x-request-timeout`.
    pub(crate) timeout: Option<Duration>,
    pub(crate) context: RequestContext,
}

impl<T: DeserializeOwned + Send + 'static> FromRequest<SharedState> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &SharedState) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let context = parts
            .extensions
            .get::<RequestContext>()
            .cloned()
            .ok_or_else(|| ApiError::internal("unknown", &"the route has no request context"))?;
        check_content_type(&parts.headers)?;
        check_content_encoding(&parts.headers)?;
        let timeout = request_timeout(&parts.headers, &state.limits)?;
        let bytes = read_body(&parts.headers, body, &state.limits).await?;
        let parsed = if bytes.len() <= state.limits.max_inline_parse_bytes {
            parse(&bytes)
        } else {
            state
                .run_blocking(Job::Parse, move || parse(&bytes))
                .await
                .ok_or_else(|| ApiError::internal(&context.id, &"the parser panicked"))?
        };
        let (value, warnings) = parsed?;
        Ok(Self { value, warnings, timeout, context })
    }
}

/// None is taken as JSON, but not from a web page of another origin; another type is refused, as a form or plain text is what a
/// web page may send across origins without a question (so is a body without a type: Fetch, "CORS-safelisted request-header").
pub(crate) fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
        let is_from_elsewhere = site.is_some_and(|site| !matches!(site, b"same-origin" | b"none"))
            || site.is_none() && headers.contains_key(header::ORIGIN);
        return if is_from_elsewhere {
            let message = "there is no content-type, which a web page must send: content-type application/json";
            Err(ApiError::invalid("content-type", message))
        } else {
            Ok(())
        };
    };
    let text = value.to_str().unwrap_or_default();
    let kind = text.split(';').next().unwrap_or_default().trim();
    if kind.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(ApiError::invalid(
        "content-type",
        format!("content-type is {}: send JSON, with content-type application/json", quote(text)),
    ))
}

/// A compressed body is not decompressed, as the body limit would have to hold for both forms of it; read as it is, it
/// would only look like broken JSON.
pub(crate) fn check_content_encoding(headers: &HeaderMap) -> Result<(), ApiError> {
    let codings = headers.get_all(header::CONTENT_ENCODING).iter();
    let coded = codings.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).find(|value| {
        !value.split(',').map(str::trim).all(|coding| coding.is_empty() || coding.eq_ignore_ascii_case("identity"))
    });
    coded.map_or(Ok(()), |coding| Err(ApiError::ContentEncoding { coding }))
}

/// Seconds (`30`, `2.5`) or a duration as people write it (`30s`, `500ms`).
pub(crate) fn request_timeout(headers: &HeaderMap, limits: &Limits) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(X_REQUEST_TIMEOUT) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    let timeout = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Err(_) => humantime::parse_duration(text).ok(),
    };
    match timeout {
        Some(timeout) if !timeout.is_zero() && timeout <= limits.max_request_timeout => Ok(Some(timeout)),
        _ => Err(ApiError::invalid(
            "x-request-timeout",
            format!(
                "x-request-timeout is {}: send seconds or a duration such as 30s, above 0 and at most {}",
                quote(text),
                humantime::format_duration(limits.max_request_timeout)
            ),
        )),
    }
}

/// Reads the whole body, or refuses it once it is over the limit.
pub(crate) async fn read_body(headers: &HeaderMap, body: Body, limits: &Limits) -> Result<Bytes, ApiError> {
    tokio::time::timeout(limits.body_read_timeout, read_within_limit(headers, body, limits))
        .await
        .unwrap_or(Err(ApiError::BodyTimeout { timeout: limits.body_read_timeout }))
}

async fn read_within_limit(headers: &HeaderMap, mut body: Body, limits: &Limits) -> Result<Bytes, ApiError> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|length| length.parse::<usize>().ok())
        .unwrap_or(0);
    let mut too_large = announced > limits.max_body_bytes;
    // What is announced is not yet sent: memory grows with what arrives.
    let mut bytes = Vec::with_capacity(if too_large { 0 } else { announced.min(limits.max_inline_parse_bytes) });
    let mut num_discarded_bytes = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            ApiError::Invalid { param: None, message: format!("the body could not be read: {}", shorten(&cause)) }
        })?;
        // Trailers carry nothing this API knows.
        let Ok(data) = frame.into_data() else { continue };
        if !too_large && bytes.len() + data.len() > limits.max_body_bytes {
            too_large = true;
            bytes = Vec::new();
        }
        if too_large {
            num_discarded_bytes += data.len();
            if num_discarded_bytes > limits.max_discarded_bytes {
                break;
            }
        } else {
            bytes.extend_from_slice(&data);
        }
    }
    if too_large {
        return Err(ApiError::BodyTooLarge { limit_bytes: limits.max_body_bytes });
    }
    Ok(bytes.into())
}

/// A body as the object that it is, all of it: what no value can hold is refused, also in fields that no route reads.
pub(crate) fn object(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    // The plain parser is the fast one; the other one knows the words.
    serde_json::from_slice(bytes).or_else(|_| parse::<Map<String, Value>>(bytes).map(|(object, _)| object))
}

/// Parses a body, and collects the names of the fields that `T` does not know.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, Warnings), ApiError> {
    let invalid = |message: String| ApiError::Invalid { param: None, message };
    let text = std::str::from_utf8(bytes).map_err(|error| {
        invalid(format!("the body is not UTF-8: the first wrong byte is at {}", error.valid_up_to()))
    })?;
    if text.trim_ascii().is_empty() {
        return Err(invalid("the body is empty: send a JSON object".into()));
    }
    let mut warnings = Warnings::default();
    let mut json = serde_json::Deserializer::from_str(text);
    let mut track = serde_path_to_error::Track::new();
    let value = {
        let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
        serde_ignored::deserialize(tracked, |path| warnings.ignored(&path))
    };
    let value = value.map_err(|error| json_error(&error, &track.path().to_string(), text))?;
    json.end().map_err(|error| json_error(&error, ".", text))?;
    Ok((value, warnings))
}

/// A parser's error in the API's words, with the field it is about.
fn json_error(error: &serde_json::Error, path: &str, body: &str) -> ApiError {
    let text = error.to_string();
    if text.starts_with("recursion limit exceeded") {
        let message = format!("the body nests arrays and objects more than {MAX_NESTING} deep, which is the limit");
        return ApiError::Invalid { param: None, message };
    }
    if !error.is_data() {
        return ApiError::Invalid { param: None, message: format!("the body is not valid JSON: {}", shorten(&text)) };
    }
    // The position in the text helps nobody who did not write the JSON by hand; the path does.
    let what = text.rfind(" at line ").map_or(text.as_str(), |end| &text[..end]);
    let mut param = if path == "." { String::new() } else { path.to_owned() };
    for prefix in ["missing field `", "duplicate field `"] {
        if let Some(field) = what.strip_prefix(prefix).and_then(|rest| rest.strip_suffix('`')) {
            // A duplicate's path names the field already.
            if param != field && !param.ends_with(&format!(".{field}")) {
                param = if param.is_empty() { field.to_owned() } else { format!("{param}.{field}") };
            }
        }
    }
    let what = out_of_range(what, error, body).unwrap_or_else(|| in_plain_words(what));
    let message = if param.is_empty() { what } else { format!("{}: {what}", shorten(&param)) };
    ApiError::Invalid { param: (!param.is_empty()).then(|| shorten(&param)), message }
}

/// A whole number that no 64 bits hold is a float to the parser, or unsigned where signed was expected. Its sender, who
/// wrote a whole number, is told the range instead.
fn out_of_range(what: &str, error: &serde_json::Error, body: &str) -> Option<String> {
    let (found, expected) = what.rsplit_once(", expected ")?;
    let range = match expected {
        "i64" => format!("a whole number from {} to {}", i64::MIN, i64::MAX),
        "u32" => TOKEN_ID.to_owned(),
        _ => return None,
    };
    let number =
        found.strip_prefix("invalid type: floating point `").or(found.strip_prefix("invalid value: integer `"))?;
    let number: f64 = number.strip_suffix('`')?.parse().ok()?;
    const LIMIT: f64 = i64::MAX as f64;
    if number.fract() != 0.0 || number.abs() < LIMIT {
        return None;
    }
    // As it was sent: it ends where the parser stopped.
    let line = body.split('\n').nth(error.line().checked_sub(1)?)?;
    let read = line.get(..error.column()).unwrap_or_default();
    let sent = &read[read.trim_end_matches(|c: char| c.is_ascii_digit() || "+-.eE".contains(c)).len()..];
    let shown = if sent.parse() == Ok(number) { sent.to_owned() } else { format!("{number:e}") };
    Some(format!("{} is out of range, expected {range}", shorten(&shown)))
}

/// What a token id is, for errors.
const TOKEN_ID: &str = "a token id (a whole number from 0 to 4294967295)";

/// serde names Rust's types, and repeats a wrong string whole.
fn in_plain_words(what: &str) -> String {
    let (found, expected) = match what.rfind(", expected ") {
        Some(at) => what.split_at(at),
        None => (what, ""),
    };
    let expected = match expected.trim_start_matches(", expected ") {
        "" => return shorten(found),
        "i64" | "u64" => "a whole number",
        "u32" => TOKEN_ID,
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "an array",
        "a map" => "an object",
        other => other,
    };
    format!("{}, expected {expected}", shorten(found))
}

/// What was accepted without effect, for `x-bindery-warning`.
#[derive(Debug, Default)]
pub(crate) struct Warnings {
    ignored: Vec<String>,
    num_ignored: usize,
    notes: Vec<&'static str>,
}

impl Warnings {
    fn ignored(&mut self, path: &serde_ignored::Path) {
        self.num_ignored += 1;
        if self.ignored.len() < MAX_IGNORED_FIELDS {
            let mut name = String::new();
            write_path(path, &mut name);
            // The header holds visible ASCII; a comma or semicolon in a name would look like a separator.
            let plain = |c: char| c.is_ascii_graphic() && !matches!(c, ',' | ';');
            self.ignored.push(name.chars().take(MAX_FIELD_CHARS).map(|c| if plain(c) { c } else { '?' }).collect());
        }
    }

    /// Adds a sentence.
    pub(crate) fn note(&mut self, note: &'static str) {
        self.notes.push(note);
    }

    /// Writes the header, where there is something to warn about.
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        let mut parts: Vec<String> = self.notes.iter().map(|&note| note.to_owned()).collect();
        if !self.ignored.is_empty() {
            let more = self.num_ignored - self.ignored.len();
            let more = if more == 0 { String::new() } else { format!(" and {more} more") };
            parts.push(format!("ignored unknown fields: {}{more}", self.ignored.join(", ")));
        }
        if let (false, Ok(value)) = (parts.is_empty(), HeaderValue::from_str(&parts.join("; "))) {
            headers.insert(X_BINDERY_WARNING, value);
        }
    }
}

/// `messages[0].mood`.
fn write_path(path: &serde_ignored::Path, out: &mut String) {
    use serde_ignored::Path;
    // Names are cut to a bounded length afterwards; a parser's depth limit bounds the recursion.
    match path {
        Path::Root => {}
        Path::Seq { parent, index } => {
            write_path(parent, out);
            // Writing to a string cannot fail.
            let _ = write!(out, "[{index}]");
        }
        Path::Map { parent, key } => {
            write_path(parent, out);
            if !out.is_empty() {
                out.push('.');
            }
            out.extend(key.chars().take(MAX_FIELD_CHARS));
        }
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            write_path(parent, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use bindery_protocol::openai::{ChatCompletionRequest, CompletionRequest, TokenizeRequest};
    use serde_json::json;

    use super::*;

    /// The param and the message of a body that is refused.
    fn refused<T: DeserializeOwned>(body: &[u8]) -> (Option<String>, String) {
        let error = parse::<T>(body).map(|_| ()).expect_err("the body is refused").to_body().error;
        (error.param, error.message)
    }

    fn check_completion(body: &str, param: Option<&str>, message: &str) {
        assert_eq!(refused::<CompletionRequest>(body.as_bytes()), (param.map(Into::into), message.into()), "{body}");
    }

    #[test]
    fn wrong_types_name_the_field_in_plain_words() {
        check_completion(
            r#"{"max_tokens": 64.0}"#,
            Some("max_tokens"),
            "max_tokens: invalid type: floating point `64.0`, expected a whole number",
        );
        check_completion(
            r#"{"temperature": "hot"}"#,
            Some("temperature"),
            "temperature: invalid type: string \"hot\", expected a number",
        );
        check_completion(
            r#"{"stream_options": {"include_usage": 1}}"#,
            Some("stream_options.include_usage"),
            "stream_options.include_usage: invalid type: integer `1`, expected true or false",
        );
        check_completion(
            r#"{"stop_token_ids": [1, -1]}"#,
            Some("stop_token_ids[1]"),
            "stop_token_ids[1]: invalid value: integer `-1`, expected a token id (a whole number from 0 to 4294967295)",
        );
        check_completion("[1]", None, "invalid type: sequence, expected a JSON object with `model` and `prompt`");
    }

    #[test]
    fn whole_numbers_beyond_64_bits_are_told_the_range() {
        let range = "a whole number from -9223372036854775808 to 9223372036854775807";
        for sent in ["18446744073709551616", "9223372036854775808", "-9223372036854775809e2", "1e30", "-1E+30"] {
            let message = format!("seed: {sent} is out of range, expected {range}");
            check_completion(&format!(r#"{{"seed": {sent}}}"#), Some("seed"), &message);
            check_completion(&format!("{{\n \"n\": 1, \"seed\":{sent}\n ,\"best_of\": 1}}"), Some("seed"), &message);
        }
        check_completion(
            r#"{"stop_token_ids": [1e30]}"#,
            Some("stop_token_ids[0]"),
            "stop_token_ids[0]: 1e30 is out of range, expected a token id (a whole number from 0 to 4294967295)",
        );
        let (_, long) = refused::<CompletionRequest>(format!(r#"{{"n": {}}}"#, "9".repeat(300)).as_bytes());
        assert!(long.starts_with("n: 9999") && long.contains("… is out of range"), "{long}");
        // The least and the most are numbers like others.
        for sent in ["-9223372036854775808", "9223372036854775807"] {
            assert!(parse::<CompletionRequest>(format!(r#"{{"seed": {sent}}}"#).as_bytes()).is_ok(), "{sent}");
        }
    }

    #[test]
    fn missing_and_duplicate_fields_are_params() {
        let chat = |body: &str| refused::<ChatCompletionRequest>(body.as_bytes());
        assert_eq!(chat("{}"), (Some("messages".into()), "messages: missing field `messages`".into()));
        assert_eq!(
            chat(r#"{"messages": [{"content": "x"}]}"#),
            (Some("messages[0].role".into()), "messages[0].role: missing field `role`".into())
        );
        assert_eq!(chat(r#"{"messages": [{"role": "robot"}]}"#).0.as_deref(), Some("messages[0].role"));
        check_completion(r#"{"n": 1, "n": 2}"#, Some("n"), "n: duplicate field `n`");
    }

    #[test]
    fn what_is_no_json_is_no_json() {
        for body in ["{", "{\"n\": NaN}", "{\"temperature\": 1e400}", "{} x", "\u{feff}{}", "{'a': 1}"] {
            let (param, message) = refused::<CompletionRequest>(body.as_bytes());
            assert!(param.is_none() && message.starts_with("the body is not valid JSON: "), "{body}: {message}");
        }
        assert_eq!(refused::<CompletionRequest>(b"  ").1, "the body is empty: send a JSON object");
        assert_eq!(
            refused::<CompletionRequest>(b"{\"prompt\": \"\xff\"}").1,
            "the body is not UTF-8: the first wrong byte is at 12"
        );
    }

    #[test]
    fn nesting_is_bounded_in_every_field_that_is_read() {
        let body = |field: &str, depth: usize| {
            let arrays = format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
            format!(r#"{{"messages": [], "{field}": {{"a": {arrays}}}}}"#)
        };
        let limit = "the body nests arrays and objects more than 127 deep, which is the limit";
        let chat = |field, depth| parse::<ChatCompletionRequest>(body(field, depth).as_bytes());
        for field in ["guided_json", "chat_template_kwargs"] {
            // The body and the field's own object are two.
            assert!(chat(field, MAX_NESTING - 2).is_ok(), "{field}");
            for depth in [MAX_NESTING - 1, 100_000] {
                let refused = chat(field, depth).map(|_| ()).expect_err("too deep").to_body().error;
                assert_eq!((refused.param, refused.message.as_str()), (None, limit), "{field} {depth}");
            }
        }
        // What nobody reads is passed over without recursion.
        assert!(chat("unknown", 100_000).is_ok());
    }

    /// What is kept as free JSON takes some thirty times its bytes.
    #[test]
    fn free_json_is_bounded_by_the_number_of_its_values() {
        use bindery_protocol::json::MAX_FREE_VALUES;
        let zeros = |count: usize| format!("[{}]", vec!["0"; count].join(","));
        let kwargs = |zeros: &str| format!(r#"{{"messages": [], "chat_template_kwargs": {{"a": {zeros}}}}}"#);
        let calls =
            |zeros: &str| format!(r#"{{"messages": [{{"role": "assistant", "tool_calls": [{{"a": {zeros}}}]}}]}}"#);
        // The object and the array count, too.
        for body in [kwargs(&zeros(MAX_FREE_VALUES - 2)), calls(&zeros(MAX_FREE_VALUES - 2))] {
            assert!(parse::<ChatCompletionRequest>(body.as_bytes()).is_ok());
        }
        for field in [r#""guided_json""#, r#""structured_outputs": {"json""#] {
            let close = "}".repeat(1 + field.matches('{').count());
            let body = |zeros: &str| format!(r#"{{"prompt": "a", {field}: {zeros}{close}"#);
            assert!(parse::<CompletionRequest>(body(&zeros(MAX_FREE_VALUES - 1)).as_bytes()).is_ok());
            let (_, message) = refused::<CompletionRequest>(body(&zeros(MAX_FREE_VALUES)).as_bytes());
            assert!(message.contains("more than 262144 JSON values"), "{message}");
        }
        let half = format!(r#"{{"role": "assistant", "tool_calls": [{{"a": {}}}]}}"#, zeros(MAX_FREE_VALUES / 2));
        let many_empty = format!(r#"{{"role": "assistant", "tool_calls": [{}]}}"#, vec!["{}"; 300_000].join(","));
        for (body, param) in [
            (kwargs(&zeros(MAX_FREE_VALUES - 1)), "chat_template_kwargs.a"),
            (kwargs(&zeros(5_000_000)), "chat_template_kwargs.a"),
            (calls(&zeros(MAX_FREE_VALUES - 1)), "messages[0].tool_calls[0].a"),
            (format!(r#"{{"messages": [{many_empty}]}}"#), "messages[0].tool_calls"),
            (format!(r#"{{"messages": [{half}, {half}]}}"#), "messages"),
        ] {
            let (found, message) = refused::<ChatCompletionRequest>(body.as_bytes());
            assert!(found.as_deref().is_some_and(|found| found.starts_with(param)), "{param}: {found:?}");
            assert!(message.contains("more than 262144 JSON values"), "{message}");
            let (_, same) = refused::<TokenizeRequest>(body.as_bytes());
            assert_eq!(same, message);
        }
        // Fields that nobody keeps are passed over at no cost but reading.
        let unknown = format!(r#"{{"messages": [], "unknown": {}}}"#, zeros(1_000_000));
        assert!(parse::<ChatCompletionRequest>(unknown.as_bytes()).is_ok());
    }

    #[test]
    fn a_long_wrong_value_is_not_repeated_whole() {
        let (_, message) = refused::<CompletionRequest>(json!({"n": "x".repeat(1 << 20)}).to_string().as_bytes());
        assert!(message.len() < 300, "{} bytes", message.len());
        assert!(message.ends_with("expected a whole number"), "{message}");
    }

    #[test]
    fn unknown_fields_are_named_with_their_path() {
        let body = json!({"prompt": "a", "user": "me", "stream_options": {"include_usage": true, "mood": 1},
            "a;b,c\n": [1, 2], "logits_processors": {"x": [{"y": 1}]}});
        let (_, warnings) = parse::<CompletionRequest>(body.to_string().as_bytes()).unwrap();
        let mut headers = HeaderMap::new();
        warnings.write(&mut headers);
        assert_eq!(headers[X_BINDERY_WARNING], "ignored unknown fields: user, stream_options.mood, a?b?c?");

        let body = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mood": 1}]}]});
        let (_, warnings) = parse::<ChatCompletionRequest>(body.to_string().as_bytes()).unwrap();
        assert_eq!(warnings.ignored, ["messages[0].content[0].mood"]);
    }

    #[test]
    fn many_unknown_fields_are_counted() {
        let fields: serde_json::Map<_, _> = (0..100).map(|at| (format!("x{at}"), json!(at))).collect();
        let body = serde_json::Value::Object(fields).to_string();
        let (_, mut warnings) = parse::<CompletionRequest>(body.as_bytes()).unwrap();
        warnings.note("cache_salt has no effect yet");
        let mut headers = HeaderMap::new();
        warnings.write(&mut headers);
        let text = headers[X_BINDERY_WARNING].to_str().unwrap();
        assert!(text.starts_with("cache_salt has no effect yet; ignored unknown fields: x0, "), "{text}");
        assert!(text.ends_with("x31 and 68 more"), "{text}");
    }

    #[test]
    fn a_timeout_is_seconds_or_a_duration() {
        let limits = Limits::new(&crate::ServerConfig {
            served_model_names: Vec::new(),
            api_keys: Vec::new(),
            tenants: Vec::new(),
            admin_key: None,
            max_body_bytes: 1,
            shutdown_timeout: Duration::ZERO,
            digest: std::sync::Arc::default(),
            license: None,
            adapter_roots: bindery_engine::adapters::AdapterRoots::default(),
            gateway: None,
        });
        let parse = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(X_REQUEST_TIMEOUT, HeaderValue::from_str(text).unwrap());
            request_timeout(&headers, &limits)
        };
        for (text, milliseconds) in [("30", 30_000), ("30s", 30_000), ("2.5", 2_500), ("500ms", 500), ("1m 1s", 61_000)]
        {
            assert_eq!(parse(text).unwrap(), Some(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "0", "-1", "nan", "inf", "1e300", "soon", "25h", "0s", "99999999999999999999s"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn content_types_other_than_json_are_refused() {
        let check = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_str(text).unwrap());
            check_content_type(&headers)
        };
        assert!(check_content_type(&HeaderMap::new()).is_ok());
        for good in ["application/json", "Application/JSON; charset=utf-8"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for wrong in ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; boundary=x"] {
            assert_eq!(check(wrong).unwrap_err().status(), 400, "{wrong}");
        }
    }
}
