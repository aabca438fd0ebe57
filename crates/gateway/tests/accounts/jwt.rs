//! JWTs, against an identity provider on loopback whose keys the test makes, changes and counts the fetches of.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use aws_lc_rs::{
    encoding::AsDer as _,
    rand::SystemRandom,
    rsa::{KeyPair as RsaKeyPair, KeySize},
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _},
};
use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use bindery_gateway::{
    clock::UnixMillis,
    keys::{Credential, IssuerOptions, JwtError, JwtVerifier, SigningAlgorithm, TenantFrom},
};
use data_encoding::BASE64URL_NOPAD as B64;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use crate::support::{NOON, tenant};

/// What the provider answers.
#[derive(Default)]
struct Provider {
    keys: Mutex<Vec<Value>>,
    fetches: AtomicUsize,
    is_down: Mutex<bool>,
    issuer: Mutex<String>,
}

struct Idp {
    provider: Arc<Provider>,
    issuer: String,
}

impl Idp {
    async fn start(keys: Vec<Value>) -> Self {
        let provider = Arc::new(Provider { keys: Mutex::new(keys), ..Provider::default() });
        let app = Router::new()
            .route("/.well-known/openid-configuration", get(configuration))
            .route("/keys", get(key_set))
            .with_state(Arc::clone(&provider));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let issuer = format!("http://{}", listener.local_addr().unwrap());
        provider.issuer.lock().unwrap().clone_from(&issuer);
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { provider, issuer }
    }

    fn options(&self, algorithms: &[SigningAlgorithm]) -> IssuerOptions {
        IssuerOptions {
            issuer: self.issuer.clone(),
            audiences: vec!["bindery".to_owned()],
            jwks_url: None,
            algorithms: algorithms.to_vec(),
            tenant: TenantFrom::Claim("tenant".to_owned()),
            leeway: Duration::from_secs(30),
        }
    }

    fn verifier(&self, algorithms: &[SigningAlgorithm]) -> JwtVerifier {
        JwtVerifier::new(vec![self.options(algorithms)]).unwrap()
    }

    /// A token's claims as they should be.
    fn claims(&self) -> Value {
        json!({
            "iss": self.issuer, "aud": "bindery", "sub": "alice", "tenant": "acme",
            "exp": NOON.0 / 1000 + 300, "nbf": NOON.0 / 1000 - 10,
        })
    }

    fn claims_with(&self, changes: &Value) -> Value {
        let mut claims = self.claims();
        for (name, value) in changes.as_object().unwrap() {
            claims[name] = value.clone();
        }
        claims
    }

    fn fetches(&self) -> usize {
        self.provider.fetches.load(Relaxed)
    }
}

async fn configuration(State(provider): State<Arc<Provider>>) -> impl IntoResponse {
    let issuer = provider.issuer.lock().unwrap().clone();
    // One that was told to lie says that its keys lie with another issuer's.
    let base = issuer.trim_end_matches("/other").to_owned();
    axum::Json(json!({"issuer": issuer, "jwks_uri": format!("{base}/keys")}))
}

async fn key_set(State(provider): State<Arc<Provider>>) -> impl IntoResponse {
    provider.fetches.fetch_add(1, Relaxed);
    if *provider.is_down.lock().unwrap() {
        return (StatusCode::SERVICE_UNAVAILABLE, "down").into_response();
    }
    axum::Json(json!({"keys": *provider.keys.lock().unwrap()})).into_response()
}

/// A key that signs, and its public half as a set holds it.
struct Signer {
    kid: &'static str,
    algorithm: Algorithm,
    private: EncodingKey,
    public: Value,
}

impl Signer {
    fn ed25519(kid: &'static str) -> Self {
        let pair = Ed25519KeyPair::generate().unwrap();
        let document = pair.to_pkcs8().unwrap();
        let x = B64.encode(pair.public_key().as_ref());
        Self {
            kid,
            algorithm: Algorithm::EdDSA,
            private: EncodingKey::from_ed_der(document.as_ref()),
            public: json!({"kty": "OKP", "crv": "Ed25519", "x": x, "kid": kid, "use": "sig"}),
        }
    }

    fn p256(kid: &'static str) -> Self {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref()).unwrap();
        // 0x04, then both coordinates.
        let point = pair.public_key().as_ref();
        let (x, y) = (B64.encode(&point[1..33]), B64.encode(&point[33..]));
        Self {
            kid,
            algorithm: Algorithm::ES256,
            private: EncodingKey::from_ec_der(document.as_ref()),
            public: json!({"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": kid, "alg": "ES256"}),
        }
    }

    fn rsa(kid: &'static str) -> Self {
        let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let pkcs8: aws_lc_rs::encoding::Pkcs8V1Der<'_> = pair.as_der().unwrap();
        let public = aws_lc_rs::signature::KeyPair::public_key(&pair);
        let (n, e) =
            (public.modulus().big_endian_without_leading_zero(), public.exponent().big_endian_without_leading_zero());
        Self {
            kid,
            algorithm: Algorithm::RS256,
            // PKCS #1, as the signing library wants it, begins after the 26 bytes that PKCS #8 puts before a key of this
            // size.
            private: EncodingKey::from_rsa_der(&pkcs8.as_ref()[26..]),
            public: json!({"kty": "RSA", "n": B64.encode(n), "e": B64.encode(e), "kid": kid}),
        }
    }

    fn sign(&self, claims: &Value) -> String {
        let mut header = Header::new(self.algorithm);
        header.kid = Some(self.kid.to_owned());
        jsonwebtoken::encode(&header, claims, &self.private).unwrap()
    }
}

fn part(value: &Value) -> String {
    B64.encode(value.to_string().as_bytes())
}

async fn refused(verifier: &JwtVerifier, token: &str) -> JwtError {
    verifier.verify(token, NOON).await.unwrap_err()
}

#[tokio::test]
async fn tokens_of_every_family_say_who_asks() {
    use SigningAlgorithm::{ES256, EdDSA, RS256};
    let signers = [Signer::ed25519("ed"), Signer::p256("ec"), Signer::rsa("rsa")];
    let idp = Idp::start(signers.iter().map(|signer| signer.public.clone()).collect()).await;
    let verifier = idp.verifier(&[EdDSA, ES256, RS256]);
    for signer in &signers {
        let who = verifier.verify(&signer.sign(&idp.claims()), NOON).await.unwrap();
        assert_eq!(who.tenant, tenant("acme"));
        assert_eq!(who.credential, Credential::Jwt { issuer: idp.issuer.clone(), subject: "alice".to_owned() });
    }
    assert_eq!(idp.fetches(), 1, "one fetch brought all");
    let only_rsa = idp.verifier(&[RS256]);
    assert!(matches!(refused(&only_rsa, &signers[0].sign(&idp.claims())).await, JwtError::Algorithm));
    // A key of one family under the name of another's.
    let mut confused = Header::new(Algorithm::EdDSA);
    confused.kid = Some("ec".to_owned());
    let token = jsonwebtoken::encode(&confused, &idp.claims(), &signers[0].private).unwrap();
    assert!(matches!(refused(&verifier, &token).await, JwtError::UnknownKey));
}

#[tokio::test]
async fn wrong_claims_are_refused_one_by_one() {
    let signer = Signer::ed25519("a");
    let idp = Idp::start(vec![signer.public.clone()]).await;
    let verifier = idp.verifier(&[SigningAlgorithm::EdDSA]);
    let now = NOON.0 / 1000;
    let error = async |changes: Value| refused(&verifier, &signer.sign(&idp.claims_with(&changes))).await;
    assert!(matches!(error(json!({"aud": "another"})).await, JwtError::Audience));
    assert!(matches!(error(json!({"aud": ["x", "y"]})).await, JwtError::Audience));
    assert!(matches!(error(json!({"aud": null})).await, JwtError::Audience));
    assert!(matches!(error(json!({"iss": "https://evil.example"})).await, JwtError::UnknownIssuer));
    assert!(matches!(error(json!({"iss": [idp.issuer]})).await, JwtError::UnknownIssuer));
    assert!(matches!(error(json!({"exp": now - 30})).await, JwtError::Expired));
    assert!(matches!(error(json!({"exp": null})).await, JwtError::Malformed(_)));
    assert!(matches!(error(json!({"exp": "never"})).await, JwtError::Malformed(_)));
    assert!(matches!(error(json!({"nbf": now + 31})).await, JwtError::NotYet));
    assert!(matches!(error(json!({"tenant": null})).await, JwtError::NoTenant { .. }));
    assert!(matches!(error(json!({"tenant": "a\nb"})).await, JwtError::NoTenant { .. }));
    for good in
        [json!({"aud": ["x", "bindery"]}), json!({"exp": now - 29}), json!({"nbf": now + 30}), json!({"exp": 1e12})]
    {
        let token = signer.sign(&idp.claims_with(&good));
        assert!(verifier.verify(&token, NOON).await.is_ok(), "{good}");
    }
    // The times are those of the clock passed in.
    let token = signer.sign(&idp.claims());
    assert!(matches!(verifier.verify(&token, NOON.after(Duration::from_secs(330))).await, Err(JwtError::Expired)));
}

#[tokio::test]
async fn tokens_without_a_signature_of_the_issuer_are_refused() {
    let (signer, other) = (Signer::rsa("a"), Signer::ed25519("a"));
    let idp = Idp::start(vec![signer.public.clone()]).await;
    let verifier = idp.verifier(&[SigningAlgorithm::RS256, SigningAlgorithm::EdDSA]);
    let good = signer.sign(&idp.claims());
    assert!(verifier.verify(&good, NOON).await.is_ok());
    // alg = none, in several spellings, with and without a signature.
    for none in ["none", "None", "NONE", "nOnE", ""] {
        let head = part(&json!({"alg": none, "typ": "JWT", "kid": "a"}));
        for signature in ["", "AAAA"] {
            let token = format!("{head}.{}.{signature}", part(&idp.claims()));
            assert!(matches!(refused(&verifier, &token).await, JwtError::Algorithm), "{none}");
        }
    }
    // HS256 with the public key as the secret, as everybody has it: the modulus, and the whole entry of the set.
    for secret in [signer.public["n"].as_str().unwrap().as_bytes().to_vec(), signer.public.to_string().into_bytes()] {
        let mut head = Header::new(Algorithm::HS256);
        head.kid = Some("a".to_owned());
        let token = jsonwebtoken::encode(&head, &idp.claims(), &EncodingKey::from_secret(&secret).unwrap()).unwrap();
        assert!(matches!(refused(&verifier, &token).await, JwtError::Algorithm));
    }
    // Another's signature, changed claims, cut and strange ones.
    let (head, rest) = good.split_once('.').unwrap();
    let (_, signature) = rest.split_once('.').unwrap();
    let forged = format!("{head}.{}.{signature}", part(&idp.claims_with(&json!({"tenant": "globex"}))));
    assert!(matches!(refused(&verifier, &forged).await, JwtError::Signature));
    assert!(matches!(refused(&verifier, &other.sign(&idp.claims())).await, JwtError::UnknownKey));
    for strange in
        ["", ".", "..", "a.b.c", "é.é.é", &good[..good.len() / 2], &format!("{good}.x"), &"a.".repeat(20_000)]
    {
        assert!(verifier.verify(strange, NOON).await.is_err(), "{strange:.40}");
    }
    let critical = part(&json!({"alg": "RS256", "kid": "a", "crit": ["b64"], "b64": false}));
    let token = format!("{critical}.{}.{signature}", part(&idp.claims()));
    assert!(matches!(refused(&verifier, &token).await, JwtError::Malformed(_)));
}

#[tokio::test]
async fn a_rotated_key_is_fetched_once_and_strangers_fetch_nothing() {
    let (old, new) = (Signer::ed25519("old"), Signer::ed25519("new"));
    let idp = Idp::start(vec![old.public.clone()]).await;
    let verifier = idp.verifier(&[SigningAlgorithm::EdDSA]);
    let at = |seconds| NOON.after(Duration::from_secs(seconds));
    let verify = async |signer: &Signer, now: UnixMillis| {
        let claims = idp.claims_with(&json!({"exp": now.0 / 1000 + 60, "nbf": 0}));
        verifier.verify(&signer.sign(&claims), now).await
    };
    verify(&old, at(0)).await.unwrap();
    *idp.provider.keys.lock().unwrap() = vec![old.public.clone(), new.public.clone()];
    // A moment after a fetch the issuer is not asked again, however many come.
    for _ in 0..50 {
        assert!(matches!(verify(&new, at(9)).await, Err(JwtError::UnknownKey)));
    }
    assert_eq!(idp.fetches(), 1);
    verify(&new, at(10)).await.unwrap();
    verify(&old, at(10)).await.unwrap();
    assert_eq!(idp.fetches(), 2);
    // Withdrawn: it opens until the set is fetched anew, within the hour.
    *idp.provider.keys.lock().unwrap() = vec![new.public.clone()];
    assert!(verify(&old, at(3_600)).await.is_ok());
    assert!(matches!(verify(&old, at(3_611)).await, Err(JwtError::UnknownKey)));
    assert_eq!(idp.fetches(), 3);
}

#[tokio::test]
async fn an_issuer_that_is_down_closes_the_door_after_a_day() {
    let signer = Signer::p256("a");
    let idp = Idp::start(vec![signer.public.clone()]).await;
    let verifier = idp.verifier(&[SigningAlgorithm::ES256]);
    let at = |hours: u64| NOON.after(Duration::from_hours(hours));
    let verify = async |now: UnixMillis| {
        let claims = idp.claims_with(&json!({"exp": now.0 / 1000 + 60, "nbf": 0}));
        verifier.verify(&signer.sign(&claims), now).await
    };
    *idp.provider.is_down.lock().unwrap() = true;
    let error = verify(at(0)).await.unwrap_err();
    assert!(matches!(&error, JwtError::KeysUnavailable { .. }) && error.to_string().contains("503"), "{error}");
    *idp.provider.is_down.lock().unwrap() = false;
    assert!(verify(at(0)).await.is_err(), "asked a moment ago");
    verify(at(1)).await.unwrap();
    *idp.provider.is_down.lock().unwrap() = true;
    verify(at(20)).await.unwrap();
    assert!(matches!(verify(at(26)).await, Err(JwtError::KeysUnavailable { .. })));
}

#[tokio::test]
async fn a_configuration_that_speaks_for_another_issuer_is_not_believed() {
    let signer = Signer::ed25519("a");
    let idp = Idp::start(vec![signer.public.clone()]).await;
    *idp.provider.issuer.lock().unwrap() = format!("{}/other", idp.issuer);
    let verifier = idp.verifier(&[SigningAlgorithm::EdDSA]);
    let error = refused(&verifier, &signer.sign(&idp.claims())).await;
    assert!(error.to_string().contains("another issuer"), "{error}");
    assert_eq!(idp.fetches(), 0);
}

#[tokio::test]
async fn the_tenant_comes_from_the_claim_that_was_configured() {
    let signer = Signer::ed25519("a");
    let idp = Idp::start(vec![signer.public.clone()]).await;
    let with = async |from: TenantFrom, changes: Value| {
        let options = IssuerOptions { tenant: from, ..idp.options(&[SigningAlgorithm::EdDSA]) };
        let verifier = JwtVerifier::new(vec![options]).unwrap();
        verifier.verify(&signer.sign(&idp.claims_with(&changes)), NOON).await.map(|who| who.tenant)
    };
    let map = || TenantFrom::Map {
        claim: "/realm/groups".to_owned(),
        tenants: BTreeMap::from([("eng".to_owned(), tenant("acme")), ("ops".to_owned(), tenant("globex"))]),
    };
    assert_eq!(with(TenantFrom::Fixed(tenant("all")), json!({})).await.unwrap(), tenant("all"));
    let namespaced = TenantFrom::Claim("https://acme.example/tenant".to_owned());
    assert_eq!(with(namespaced, json!({"https://acme.example/tenant": "x"})).await.unwrap(), tenant("x"));
    assert_eq!(with(map(), json!({"realm": {"groups": ["staff", "ops"]}})).await.unwrap(), tenant("globex"));
    assert_eq!(with(map(), json!({"realm": {"groups": "eng"}})).await.unwrap(), tenant("acme"));
    for none in [json!({"realm": {"groups": ["eng", "ops"]}}), json!({"realm": {"groups": []}}), json!({"realm": 7})] {
        assert!(matches!(with(map(), none.clone()).await, Err(JwtError::NoTenant { .. })), "{none}");
    }
}

#[tokio::test]
async fn settings_that_would_let_strangers_in_are_refused() {
    let idp = Idp::start(Vec::new()).await;
    let good = idp.options(&[SigningAlgorithm::EdDSA]);
    let bad = [
        vec![IssuerOptions { audiences: Vec::new(), ..good.clone() }],
        vec![IssuerOptions { algorithms: Vec::new(), ..good.clone() }],
        vec![IssuerOptions { issuer: "http://id.example".to_owned(), ..good.clone() }],
        vec![IssuerOptions { jwks_url: Some("http://id.example/keys".to_owned()), ..good.clone() }],
        vec![good.clone(), good.clone()],
    ];
    for issuers in bad {
        assert!(matches!(JwtVerifier::new(issuers), Err(JwtError::BadIssuer { .. })));
    }
    assert!(JwtVerifier::new(vec![good]).is_ok());
}
