//! Pictures and documents inside a request: `data:` URLs taken apart.
//!
//! Fetches nothing. Invariant: the data is handed on as it came; whoever receives it decodes it.

/// `data:<type>;base64,<data>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DataUrl<'a> {
    /// Lower-case or not, as it came; never empty.
    pub(crate) media_type: &'a str,
    /// Base64.
    pub(crate) data: &'a str,
}

/// What a URL in a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MediaUrl<'a> {
    /// The bytes themselves.
    Data(DataUrl<'a>),
    /// To be fetched by the provider.
    Remote(&'a str),
    /// Anything else.
    Unusable,
}

impl<'a> MediaUrl<'a> {
    pub(crate) fn parse(url: &'a str) -> Self {
        match url.split_once(':') {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("data") => {
                DataUrl::parse(rest).map_or(Self::Unusable, Self::Data)
            }
            Some((scheme, _)) if scheme.eq_ignore_ascii_case("https") || scheme.eq_ignore_ascii_case("http") => {
                Self::Remote(url)
            }
            _ => Self::Unusable,
        }
    }
}

impl<'a> DataUrl<'a> {
    fn parse(rest: &'a str) -> Option<Self> {
        let (head, data) = rest.split_once(',')?;
        let head = head.strip_suffix(";base64")?;
        let media_type = head.split(';').next().unwrap_or(head).trim();
        let is_base64 = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=' | b'-' | b'_');
        let is_type = media_type.split_once('/').is_some_and(|(kind, sub)| !kind.is_empty() && !sub.is_empty());
        (is_type && !data.is_empty() && data.bytes().all(is_base64)).then_some(Self { media_type, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_urls_are_taken_apart_and_others_told_from_them() {
        let data = |media_type, data| MediaUrl::Data(DataUrl { media_type, data });
        assert_eq!(MediaUrl::parse("data:image/png;base64,aGk="), data("image/png", "aGk="));
        assert_eq!(MediaUrl::parse("DATA:image/png;charset=x;base64,aGk="), data("image/png", "aGk="));
        assert_eq!(MediaUrl::parse("https://h/a.png"), MediaUrl::Remote("https://h/a.png"));
        for bad in [
            "data:image/png,hi",
            "data:;base64,aGk=",
            "data:image/png;base64,",
            "data:image/png;base64,a b",
            "ftp://x",
            "x",
        ] {
            assert_eq!(MediaUrl::parse(bad), MediaUrl::Unusable, "{bad}");
        }
    }
}
