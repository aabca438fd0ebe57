//! What holds for every provider's streams: cut anywhere they are not complete, and nothing a provider may send breaks
//! the reader.

use proptest::prelude::*;

use super::*;

/// Each provider's recorded stream, and its reader.
fn all() -> Vec<(&'static str, AnswerReader, Vec<SseEvent>)> {
    let reader = |provider: Provider, model: &str| {
        Asked::of(provider, model)
            .send(hi(json!({"stream": true, "stream_options": {"include_usage": true}})))
            .unwrap()
            .reader
    };
    vec![
        ("openai", reader(Provider::OpenAi, "gpt-5.5"), super::openai::recorded()),
        ("azure", reader(Provider::Azure(AzureForm::V1), "gpt-5.5"), super::openai::recorded()),
        ("compatible", reader(Provider::Compatible, "llama"), super::openai::recorded()),
        ("anthropic", reader(Provider::Anthropic, "claude-opus-5-5"), super::anthropic::recorded()),
        ("gemini", reader(Provider::Gemini, "gemini-3.8-flash"), super::gemini::recorded()),
    ]
}

#[test]
fn a_stream_cut_after_any_event_is_not_complete() {
    for (name, reader, events) in all() {
        assert!(stream(reader.clone(), &events).is_ok(), "{name}");
        for kept in 0..events.len() {
            let mut reader = reader.clone();
            let mut chunks = Vec::new();
            for event in &events[..kept] {
                chunks.extend(reader.event(event).unwrap());
            }
            assert!(!reader.is_done(), "{name} after {kept}");
            let finished = chunks.iter().flat_map(|chunk| &chunk.choices).filter(|choice| choice.finish.is_some());
            assert_eq!(finished.count(), 0, "{name} after {kept}");
            assert_eq!(reader.end().unwrap_err().cause, Cause::Cut, "{name} after {kept}");
            assert!(reader.partial_usage().estimated);
        }
    }
}

#[test]
fn what_follows_the_end_changes_nothing() {
    for (name, mut reader, events) in all() {
        for event in &events {
            reader.event(event).unwrap();
        }
        let ended = reader.end().unwrap();
        assert!(ended.chunks.last().unwrap().usage.as_ref().is_some_and(|usage| !usage.is_null()), "{name}");
        for event in &events {
            assert_eq!(reader.event(event), Ok(Vec::new()), "{name}");
        }
        assert!(reader.end().is_err(), "{name}");
    }
}

/// What a stream's data may be turned into by a broken or hostile server.
fn damage() -> impl Strategy<Value = (usize, u8, usize, String)> {
    (any::<usize>(), 0u8..5, any::<usize>(), "[ -~]{0,20}")
}

proptest! {
    /// One event left out, doubled, cut short, or replaced: never a panic; and what ends well has ended by the mark.
    #[test]
    fn a_damaged_stream_is_an_error_or_still_has_its_end(which in 0usize..5, (at, how, place, text) in damage()) {
        let (_, mut reader, mut events) = all().swap_remove(which);
        let at = at % events.len();
        let was_mark = at + 1 == events.len();
        match how {
            0 => drop(events.remove(at)),
            1 => events.insert(at, events[at].clone()),
            2 => {
                let mut end = place % (events[at].data.len() + 1);
                while !events[at].data.is_char_boundary(end) {
                    end -= 1;
                }
                events[at].data.truncate(end);
            }
            3 => events[at].data = text,
            _ => events[at].data = format!("{{\"type\":\"{}\",\"choices\":[{{}}],\"candidates\":[{{}}]}}", events[at].event),
        }
        let mut result = Ok(Vec::new());
        for event in &events {
            result = reader.event(event);
            if result.is_err() {
                break;
            }
        }
        match result {
            Err(error) => {
                prop_assert!(reader.end().is_err());
                prop_assert!(error.status() >= 400);
            }
            Ok(_) => if reader.end().is_ok() {
                // The mark itself cannot have been lost: it came twice, or whole, or (Anthropic's) with more beside it.
                let is_whole = how == 2 && events[at].data == all().swap_remove(which).2[at].data;
                prop_assert!(!was_mark || how == 1 || is_whole || how == 4 && which == 3);
            },
        }
    }

    /// A text may come in any pieces: the same answer.
    #[test]
    fn pieces_of_any_size_give_the_same_answer(text in "\\PC{1,40}", cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
        let chars: Vec<char> = text.chars().collect();
        let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(chars.len() + 1)).collect();
        places.extend([0, chars.len()]);
        places.sort_unstable();
        let pieces: Vec<String> = places.windows(2).map(|pair| chars[pair[0]..pair[1]].iter().collect()).collect();
        for (name, reader, _) in all() {
            let events: Vec<SseEvent> = match name {
                "anthropic" => {
                    let start = json!({"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 1, "output_tokens": 0}}});
                    let begin = json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}});
                    let more = pieces.iter().map(|piece| json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}));
                    let end = [json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}}), json!({"type": "message_stop"})];
                    [start, begin].into_iter().chain(more).chain(end).map(|value| event(&value)).collect()
                }
                "gemini" => {
                    let end = json!({"candidates": [{"finishReason": "STOP"}]});
                    pieces.iter().map(|piece| json!({"candidates": [{"content": {"parts": [{"text": piece}]}}]})).chain([end]).map(|value| event(&value)).collect()
                }
                _ => {
                    let more = pieces.iter().map(|piece| super::openai::chunk(&json!({"content": piece}), None));
                    more.chain([super::openai::chunk(&json!({}), Some("stop")), done()]).collect()
                }
            };
            let chunks = stream(reader, &events).unwrap().chunks;
            prop_assert_eq!(&gathered(&chunks)[0]["message"]["content"], &json!(text), "{}", name);
            prop_assert_eq!(&gathered(&chunks)[0]["finish_reason"], &json!("stop"));
        }
    }
}
