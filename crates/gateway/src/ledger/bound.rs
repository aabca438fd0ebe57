//! How many tokens a prompt can be at most, for any tokenizer, without having one.
//!
//! Every tokenizer in use falls back to single bytes, so a text never has more tokens than UTF-8 bytes; what a provider
//! adds around a message (role, separators, names of tools) is covered by a fixed amount, and images by the most that
//! their provider counts for one. The bound is three to four times the truth for English text: it decides what is set
//! aside, never what is charged.
//!
//! **Invariant**: larger prompts have larger bounds, and no sum wraps.

/// Around each message: role words, separators, the marker for a tokenizer's leading space. The largest overhead that a
/// provider documents is OpenAI's: 3 tokens a message and 1 for a name.
const TOKENS_PER_MESSAGE: u64 = 16;

/// Around the whole: the opening of the answer, and the text a provider adds when tools are given (Anthropic documents up
/// to 313 tokens for `tool_choice: any`, 346 for `auto`).
const TOKENS_PER_REQUEST: u64 = 512;

/// The size of a prompt, counted over everything that is sent: texts, names, tools, schemas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptSize {
    /// Of all texts together.
    pub num_bytes: u64,
    /// Of those, of characters beyond ASCII.
    pub num_wide_bytes: u64,
    /// Messages, tool results among them.
    pub num_messages: u64,
    /// What is around the texts in structures, and in texts that are written with escapes.
    pub num_overhead_bytes: u64,
    /// Images.
    pub num_images: u64,
    /// Documents, whose bytes say nothing of their tokens.
    pub num_documents: u64,
}

/// The most tokens one image counts, by the beginning of the model's id; the first row that fits.
///
/// From what the providers document, at the largest size that they do not scale down: OpenAI's tiles (8 of 512 pixels and
/// the base) and patches (1,536 times the model's factor; 10,000 at detail `original`), Anthropic's pixels / 750 at
/// 2,576 pixels, Gemini's 258 a tile at 16 tiles or `media_resolution` ultra high. Rounded up.
const IMAGE_TOKENS: &[(&str, u64)] = &[
    ("gpt-4o-mini", 50_000),
    ("gpt-4o", 1_600),
    ("gpt-4.1-mini", 4_000),
    ("gpt-4.1-nano", 4_000),
    ("gpt-4.1", 1_600),
    ("gpt-4-turbo", 1_600),
    ("gpt-5-mini", 4_000),
    ("gpt-5-nano", 4_000),
    ("gpt-", 26_000),
    ("o1", 1_600),
    ("o3", 1_600),
    ("o4-mini", 4_000),
    ("claude-", 5_000),
    ("gemini-", 5_000),
];

/// For a model that no row fits: more than any row.
const IMAGE_TOKENS_UNKNOWN: u64 = 50_000;

/// The most tokens one image counts for a model.
pub fn max_image_tokens(model: &str) -> u64 {
    IMAGE_TOKENS.iter().find(|(prefix, _)| model.starts_with(prefix)).map_or(IMAGE_TOKENS_UNKNOWN, |(_, most)| *most)
}

/// The most tokens the prompt can be, where an image counts at most `max_image_tokens`.
pub fn max_prompt_tokens(size: PromptSize, max_image_tokens: u64) -> u64 {
    size.num_bytes
        .saturating_add(size.num_overhead_bytes)
        .saturating_add(size.num_messages.saturating_mul(TOKENS_PER_MESSAGE))
        .saturating_add(size.num_images.saturating_mul(max_image_tokens))
        .saturating_add(TOKENS_PER_REQUEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_has_no_more_tokens_than_bytes_and_what_is_around_them() {
        let size =
            PromptSize { num_bytes: "héllo".len() as u64, num_messages: 2, num_images: 1, ..PromptSize::default() };
        assert_eq!(max_prompt_tokens(size, 1_600), 6 + 2 * 16 + 1_600 + 512);
        assert_eq!(max_prompt_tokens(PromptSize { num_bytes: u64::MAX, ..size }, 1), u64::MAX, "and never wraps");
    }

    #[test]
    fn an_image_counts_by_its_model_and_most_where_that_is_unknown() {
        assert_eq!(max_image_tokens("gpt-4o-mini-2024-07-18"), 50_000);
        assert_eq!(max_image_tokens("gpt-4o"), 1_600);
        assert_eq!(max_image_tokens("claude-opus-5"), 5_000);
        assert!(IMAGE_TOKENS.iter().all(|(_, most)| *most <= max_image_tokens("llama-9-vision")));
        for (index, (prefix, _)) in IMAGE_TOKENS.iter().enumerate() {
            let earlier = IMAGE_TOKENS[..index].iter().find(|(earlier, _)| prefix.starts_with(earlier));
            assert_eq!(earlier, None, "{prefix} is hidden by an earlier row");
        }
    }
}
