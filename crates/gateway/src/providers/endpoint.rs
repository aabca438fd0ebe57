//! Where an upstream is and how it knows us: base URL and credential.
//!
//! Knows no request. Invariant: a base URL carries no credential of its own, and a credential leaves only as a header
//! marked sensitive, so that neither shows in a log.

use http::{HeaderMap, HeaderName, HeaderValue};
use url::Url;

use super::{Provider, secret::Secret};

/// One upstream's address and credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    base: BaseUrl,
    credential: Credential,
    headers: HeaderMap,
    end_users: EndUsers,
}

/// How an upstream knows us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// It does not ask.
    None,
    /// An API key, in the header that the provider wants it in.
    Key(Secret),
    /// A token that lasts a while (Entra, OAuth), as `Authorization: Bearer`.
    Bearer(Secret),
}

/// What an upstream learns about the person behind a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndUsers {
    /// Nothing, where its own fields are not OpenAI's.
    Unnamed,
    /// A keyed hash: the same person looks the same, and that is all.
    Hashed(Secret),
}

/// The URL that a provider's own SDK takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl(Url);

/// Why an address cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// Not a URL.
    #[error("`base_url` is not a URL ({why}); write it like https://api.example.com/v1")]
    NotAUrl {
        /// What the parser says.
        why: String,
    },
    /// Another scheme.
    #[error("`base_url` has the scheme `{scheme}`; write http or https")]
    Scheme {
        /// Which.
        scheme: String,
    },
    /// `user:password@`, a query or a fragment.
    #[error("`base_url` carries {what}; remove it (keys belong in `api_key_env`)")]
    Carries {
        /// What it carries.
        what: &'static str,
    },
    /// This kind of upstream has no address of its own.
    #[error("an upstream of kind `{kind}` needs a `base_url`")]
    Missing {
        /// The provider.
        kind: &'static str,
    },
    /// Not a header.
    #[error("the {what} cannot be sent as a header: it has line breaks or other control characters")]
    NotAHeader {
        /// Which setting.
        what: &'static str,
    },
}

impl BaseUrl {
    /// Checks an address.
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        let url = Url::parse(text.trim()).map_err(|why| EndpointError::NotAUrl { why: why.to_string() })?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(EndpointError::Scheme { scheme: url.scheme().to_owned() });
        }
        let carries = |what| Err(EndpointError::Carries { what });
        if !url.username().is_empty() || url.password().is_some() {
            return carries("a user or password");
        }
        if url.query().is_some() {
            return carries("a query");
        }
        if url.fragment().is_some() {
            return carries("a fragment");
        }
        Ok(Self(url))
    }

    /// The path's segments, without the empty one that a trailing slash makes.
    pub(crate) fn segments(&self) -> Vec<&str> {
        self.0.path_segments().map(|all| all.filter(|segment| !segment.is_empty()).collect()).unwrap_or_default()
    }

    /// This address with a path in place of its own; segments are escaped.
    pub(crate) fn with_path<'a>(&self, segments: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.0.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.clear().extend(segments);
        }
        url
    }
}

impl Endpoint {
    /// An upstream of a provider at its own address, or at another.
    pub fn new(provider: &Provider, base_url: Option<&str>, credential: Credential) -> Result<Self, EndpointError> {
        let address = base_url.or(provider.default_base_url());
        let address = address.ok_or(EndpointError::Missing { kind: provider.kind() })?;
        let mut headers = HeaderMap::new();
        match &credential {
            Credential::None => {}
            Credential::Key(key) => {
                let (name, value) = provider.key_header(key);
                headers.insert(name, sensitive(&value, "API key")?);
            }
            Credential::Bearer(token) => {
                let value = Secret::new(&format!("Bearer {}", token.expose()));
                headers.insert(http::header::AUTHORIZATION, sensitive(&value, "token")?);
            }
        }
        Ok(Self { base: BaseUrl::parse(address)?, credential, headers, end_users: EndUsers::Unnamed })
    }

    /// With OpenAI's organization and project.
    pub fn with_account(mut self, organization: Option<&str>, project: Option<&str>) -> Result<Self, EndpointError> {
        let settings = [("openai-organization", organization, "organization"), ("openai-project", project, "project")];
        for (name, value, what) in settings {
            if let Some(value) = value {
                let value = HeaderValue::from_str(value).map_err(|_| EndpointError::NotAHeader { what })?;
                self.headers.insert(HeaderName::from_static(name), value);
            }
        }
        Ok(self)
    }

    /// With a rule for what it learns about people.
    #[must_use]
    pub fn with_end_users(mut self, end_users: EndUsers) -> Self {
        self.end_users = end_users;
        self
    }

    /// Where it is.
    pub fn base(&self) -> &BaseUrl {
        &self.base
    }

    /// What it learns about people.
    pub fn end_users(&self) -> &EndUsers {
        &self.end_users
    }

    /// Every header that is the same for all of its requests, the credential among them.
    pub(crate) fn headers(&self) -> HeaderMap {
        self.headers.clone()
    }

    /// The credential's text, to keep it out of what the upstream says.
    pub(crate) fn secret(&self) -> Option<&Secret> {
        match &self.credential {
            Credential::None => None,
            Credential::Key(secret) | Credential::Bearer(secret) => Some(secret),
        }
    }
}

fn sensitive(value: &Secret, what: &'static str) -> Result<HeaderValue, EndpointError> {
    let mut value = HeaderValue::from_str(value.expose()).map_err(|_| EndpointError::NotAHeader { what })?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_with_a_credential_in_it_is_refused() {
        for (text, part) in [
            ("https://me:secret@h/v1", "password"),
            ("https://h/v1?key=secret", "query"),
            ("https://h/v1#x", "fragment"),
            ("ftp://h", "ftp"),
            ("h:8000x", "scheme"),
            ("", "not a URL"),
        ] {
            let error = BaseUrl::parse(text).unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains("secret"), "{text}: {error}");
        }
        assert!(BaseUrl::parse("http://127.0.0.1:8000/v1/").is_ok());
    }

    #[test]
    fn credentials_do_not_show_in_debug() {
        for provider in [Provider::OpenAi, Provider::Anthropic, Provider::Gemini, Provider::Compatible] {
            let base = "http://h";
            for credential in [Credential::Key(Secret::new("topsecret")), Credential::Bearer(Secret::new("topsecret"))]
            {
                let endpoint = Endpoint::new(&provider, Some(base), credential).unwrap();
                assert!(!format!("{endpoint:?}").contains("topsecret"));
                let sent = endpoint.headers();
                assert!(sent.values().any(|value| value.to_str().unwrap().contains("topsecret")));
            }
        }
        let broken = Endpoint::new(&Provider::OpenAi, None, Credential::Key(Secret::new("a\nb")));
        assert_eq!(broken.unwrap_err(), EndpointError::NotAHeader { what: "API key" });
    }
}
