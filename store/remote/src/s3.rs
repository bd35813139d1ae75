//! A remote in a bucket of S3, or of anything that speaks its protocol.
//!
//! Credentials, region and endpoint come as everywhere with AWS (environment, profile, web identity,
//! container, instance), unless the location says otherwise. They must allow to list as well
//! (`s3:ListBucket`): without that S3 answers a read of what is not there as if it were forbidden. A
//! service other than AWS is asked with the bucket in the path, which all of them understand. What a body
//! holds is told by digests, so the SDK's own checksums, which not all services know, are sent only where
//! S3 demands them.

use std::env;
use std::error::Error;
use std::future::Future;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::{RequestChecksumCalculation, ResponseChecksumValidation};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_smithy_http_client::Builder;
use aws_smithy_http_client::tls::{self, rustls_provider::CryptoMode};
use bytes::{Bytes, BytesMut};

use crate::error::{self, RemoteError};
use crate::location::S3Location;
use crate::name::{Kind, ObjectName};
use crate::{Body, Limits, Object, Put, Remote, Written};

/// How long a body may stand still before it counts as broken off.
const STALLED: Duration = Duration::from_secs(5);

/// How long to wait for who writes or removes the same object; longer each time.
const CONFLICT: Duration = Duration::from_millis(200);

/// The clocks of both sides differ too much (S3 API Reference, "Error responses"). They are set right
/// without anybody's doing, and it says nothing about what was asked for. The SDK signs again with the time
/// of the other side where the date of the answer shows the difference, and only there.
const SKEWED: &str = "RequestTimeTooSkewed";

/// The region of who has none.
const ANY_REGION: &str = "us-east-1";

/// Variables that name a region (SDKs and Tools Reference Guide, "AWS Region").
const REGIONS: [&str; 2] = ["AWS_REGION", "AWS_DEFAULT_REGION"];

/// A remote in a bucket.
#[derive(Debug)]
pub struct S3Remote {
    client: Client,
    bucket: String,
    prefix: String,
    /// For people.
    place: String,
    limits: Limits,
    /// Whether the service knows `If-None-Match`, as far as anybody has found out.
    is_conditional: AtomicBool,
}

/// An answer that is none.
struct Failure {
    /// HTTP status, where there was an answer.
    status: Option<u16>,
    /// The service's name for it.
    code: Option<String>,
    /// In words.
    reason: String,
    cause: Cause,
}

/// Why there is no answer, as far as that is this machine's doing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// No credentials, or none that can be used.
    Denial,
    /// What was to be sent is no request.
    Request,
    /// Anything else.
    Other,
}

impl S3Remote {
    /// The remote in this bucket. Asks nobody yet, except where the region is not told: the instance.
    pub async fn new(location: &S3Location, limits: Limits) -> Result<Self, RemoteError> {
        let place = location.to_string();
        let loaded = tokio::time::timeout(limits.call, load(location, limits)).await;
        let shared = loaded.map_err(|_| RemoteError::TimedOut {
            place: place.clone(),
            limit: limits.call,
        })?;
        let mut config = aws_sdk_s3::config::Builder::from(&shared)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .force_path_style(is_elsewhere(location) || shared.endpoint_url().is_some());
        if shared.region().is_none() {
            config = config.region(Region::from_static(ANY_REGION));
        }
        Ok(Self {
            client: Client::from_conf(config.build()),
            bucket: location.bucket.clone(),
            prefix: match location.prefix.as_str() {
                "" => String::new(),
                prefix => format!("{prefix}/"),
            },
            place,
            limits,
            is_conditional: AtomicBool::new(true),
        })
    }

    fn key(&self, name: &ObjectName) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Ends a call that moves so many bytes when its time is over.
    async fn in_time<T>(
        &self,
        bytes: u64,
        call: impl Future<Output = Result<T, RemoteError>> + Send,
    ) -> Result<T, RemoteError> {
        let limit = self.limits.moving(bytes);
        // The futures of the SDK are large, and would be copied around.
        let ended = tokio::time::timeout(limit, Box::pin(call)).await;
        ended.unwrap_or_else(|_| {
            Err(RemoteError::TimedOut {
                place: self.place.clone(),
                limit,
            })
        })
    }

    fn error(&self, failure: Failure) -> RemoteError {
        let (place, reason) = (self.place.clone(), failure.reason);
        let code = failure.code.as_deref();
        match (failure.status, failure.cause) {
            (_, Cause::Denial) => RemoteError::Denied { place, reason },
            (_, Cause::Request) => RemoteError::Refused { place, reason },
            _ if code == Some("ExpiredToken") => RemoteError::Denied { place, reason },
            _ if code == Some(SKEWED) => RemoteError::Unreachable { place, reason },
            (Some(401 | 403), _) => RemoteError::Denied { place, reason },
            // 409: somebody else is writing or removing it right now.
            (None | Some(408 | 409 | 429 | 500..), _) => RemoteError::Unreachable { place, reason },
            (Some(_), _) => RemoteError::Refused { place, reason },
        }
    }

    async fn start_get(
        &self,
        name: &ObjectName,
        range: Option<&Range<u64>>,
    ) -> Result<GetObjectOutput, Failure> {
        let range = range.map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        let sent = self
            .client
            .get_object()
            .bucket(&self.bucket)
            .key(self.key(name))
            .set_range(range)
            .send()
            .await;
        sent.map_err(|error| Failure::of(&error))
    }

    async fn read_body(
        &self,
        name: &ObjectName,
        object: GetObjectOutput,
        most: u64,
    ) -> Result<Bytes, RemoteError> {
        let too_large = || RemoteError::TooLarge {
            name: name.clone(),
            most,
        };
        let length = object
            .content_length()
            .and_then(|length| u64::try_from(length).ok());
        if length.is_some_and(|length| length > most) {
            return Err(too_large());
        }
        let mut bytes = BytesMut::new();
        let mut body = object.body;
        while let Some(part) = body.next().await {
            let part = part.map_err(|error| RemoteError::Unreachable {
                place: self.place.clone(),
                reason: innermost(&error),
            })?;
            if (bytes.len() + part.len()) as u64 > most {
                return Err(too_large());
            }
            bytes.extend_from_slice(&part);
        }
        if length.is_some_and(|length| length != bytes.len() as u64) {
            return Err(RemoteError::Unreachable {
                place: self.place.clone(),
                reason: format!("the body of {name} was cut short"),
            });
        }
        Ok(bytes.freeze())
    }

    async fn put_once(
        &self,
        name: &ObjectName,
        body: &Body,
        size: u64,
        is_conditional: bool,
    ) -> Result<Written, Failure> {
        let body = match body {
            Body::Bytes(bytes) => ByteStream::from(bytes.clone()),
            Body::File(path) => ByteStream::from_path(path)
                .await
                .map_err(|error| Failure::here(&error))?,
        };
        // The first byte of the answer comes after the last one of the body.
        let whole = self.limits.moving(size);
        let timeouts = TimeoutConfig::builder().read_timeout(whole).build();
        let sent = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(self.key(name))
            .set_if_none_match(is_conditional.then(|| "*".to_owned()))
            .body(body)
            .customize()
            .config_override(aws_sdk_s3::config::Builder::new().timeout_config(timeouts))
            .send()
            .await;
        match sent.map_err(|error| Failure::of(&error)) {
            Ok(_) => Ok(Written::New),
            Err(failure) if is_conditional && failure.status == Some(412) => Ok(Written::Existed),
            Err(failure) => Err(failure),
        }
    }

    async fn put_if_absent(
        &self,
        name: &ObjectName,
        body: &Body,
        size: u64,
    ) -> Result<Written, RemoteError> {
        let mut pauses = (1..self.limits.tries).map(|times| CONFLICT * times);
        while self.is_conditional.load(Ordering::Relaxed) {
            match self.put_once(name, body, size, true).await {
                Err(failure) if failure.status == Some(501) => {
                    self.is_conditional.store(false, Ordering::Relaxed);
                }
                // It may be written or removed at this moment, which says nothing about what will be
                // there (S3 API Reference, PutObject).
                Err(failure) if failure.status == Some(409) => match pauses.next() {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => return Err(self.error(failure)),
                },
                result => return result.map_err(|failure| self.error(failure)),
            }
        }
        if self.look(name).await?.is_some() {
            return Ok(Written::Existed);
        }
        let written = self.put_once(name, body, size, false).await;
        written.map_err(|failure| self.error(failure))
    }

    async fn look(&self, name: &ObjectName) -> Result<Option<Object>, RemoteError> {
        let request = self
            .client
            .head_object()
            .bucket(&self.bucket)
            .key(self.key(name));
        match request.send().await.map_err(|error| Failure::of(&error)) {
            Ok(found) => Ok(Some(Object {
                name: name.clone(),
                size: size(found.content_length()),
                modified: time(found.last_modified()).unwrap_or(SystemTime::now()),
            })),
            Err(failure) if failure.is_absent() => Ok(None),
            Err(failure) => Err(self.error(failure)),
        }
    }

    /// One page, and where the next one starts.
    async fn page(
        &self,
        prefix: &str,
        after: &str,
        continued: Option<String>,
    ) -> Result<(Vec<Object>, Option<String>), RemoteError> {
        let listed = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(prefix)
            .start_after(after)
            .set_continuation_token(continued)
            .send()
            .await;
        let listed = listed.map_err(|error| self.error(Failure::of(&error)))?;
        let refused = |reason: &str| RemoteError::Refused {
            place: self.place.clone(),
            reason: reason.to_owned(),
        };
        let mut objects = Vec::new();
        for object in listed.contents() {
            let key = object.key().and_then(|key| key.strip_prefix(&self.prefix));
            let Some(Ok(name)) = key.map(str::parse) else {
                // Somebody else's.
                continue;
            };
            let undated = || refused("it lists an object without a date");
            objects.push(Object {
                name,
                size: size(object.size()),
                modified: time(object.last_modified()).ok_or_else(undated)?,
            });
        }
        let next = listed.next_continuation_token().map(str::to_owned);
        if listed.is_truncated().unwrap_or_default() && next.is_none() {
            return Err(refused(
                "it lists a part, and does not say where the rest begins",
            ));
        }
        Ok((objects, next))
    }
}

#[async_trait]
impl Remote for S3Remote {
    async fn get(
        &self,
        name: &ObjectName,
        range: Option<Range<u64>>,
        most: u64,
    ) -> Result<Option<Bytes>, RemoteError> {
        let most = range.as_ref().map_or(most, |range| {
            most.min(range.end.saturating_sub(range.start))
        });
        self.in_time(most, async {
            if range.as_ref().is_some_and(Range::is_empty) {
                return Ok(self.look(name).await?.map(|_| Bytes::new()));
            }
            let mut tries = 0..self.limits.tries.max(1);
            loop {
                tries.next();
                let read = match self.start_get(name, range.as_ref()).await {
                    Ok(object) => self.read_body(name, object, most).await,
                    Err(failure) if failure.is_absent() => return Ok(None),
                    // It has no such bytes (RFC 9110, 15.5.17).
                    Err(failure) if failure.status == Some(416) => return Ok(Some(Bytes::new())),
                    // What else has not begun the SDK has tried again.
                    Err(failure) if failure.is_skew() => Err(self.error(failure)),
                    Err(failure) => return Err(self.error(failure)),
                };
                match read {
                    Err(error) if error.is_passing() && !tries.is_empty() => {}
                    result => return result.map(Some),
                }
            }
        })
        .await
    }

    async fn put(&self, name: &ObjectName, body: Body, mode: Put) -> Result<Written, RemoteError> {
        let size = error::size(&body).await?;
        self.in_time(size, async {
            match mode {
                Put::IfAbsent => self.put_if_absent(name, &body, size).await,
                Put::Replace => {
                    let written = self.put_once(name, &body, size, false).await;
                    written.map_err(|failure| self.error(failure))
                }
            }
        })
        .await
    }

    async fn head(&self, name: &ObjectName) -> Result<Option<Object>, RemoteError> {
        self.in_time(0, self.look(name)).await
    }

    async fn list(
        &self,
        kind: Kind,
        after: Option<&ObjectName>,
    ) -> Result<Vec<Object>, RemoteError> {
        self.in_time(0, async {
            let prefix = format!("{}{}", self.prefix, kind.prefix());
            let after = after.map_or_else(|| prefix.clone(), |name| self.key(name));
            let mut continued = None;
            loop {
                let (objects, next) = self.page(&prefix, &after, continued).await?;
                // A page of names that are none is not the end.
                if !objects.is_empty() || next.is_none() {
                    return Ok(objects);
                }
                continued = next;
            }
        })
        .await
    }

    async fn delete(&self, name: &ObjectName) -> Result<(), RemoteError> {
        self.in_time(0, async {
            let request = self
                .client
                .delete_object()
                .bucket(&self.bucket)
                .key(self.key(name));
            match request.send().await.map_err(|error| Failure::of(&error)) {
                Err(failure) if !failure.is_absent() => Err(self.error(failure)),
                _ => Ok(()),
            }
        })
        .await
    }
}

impl Failure {
    fn of<E>(error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        let status = error
            .raw_response()
            .map(|response| response.status().as_u16());
        let code = error.code().map(str::to_owned);
        let message = error.message().map(str::to_owned);
        let reason = match (&code, message) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            (Some(code), None) => code.clone(),
            _ => match status {
                Some(status) => format!("HTTP status {status}"),
                None => innermost(error),
            },
        };
        let cause = match error {
            SdkError::ConstructionFailure(_) => Cause::Request,
            _ if sources(error).any(is_denial) => Cause::Denial,
            _ => Cause::Other,
        };
        Self {
            status,
            code,
            // The chain of credentials tells each of its links in a line of its own.
            reason: reason.split_whitespace().collect::<Vec<_>>().join(" "),
            cause,
        }
    }

    /// What went wrong before anything was sent.
    fn here(error: &(dyn Error + 'static)) -> Self {
        Self {
            status: None,
            code: None,
            reason: innermost(error),
            cause: Cause::Request,
        }
    }

    fn is_skew(&self) -> bool {
        self.code.as_deref() == Some(SKEWED)
    }

    /// Whether it says that there is no such object. Another 404 comes from who knows no objects at all.
    fn is_absent(&self) -> bool {
        self.status == Some(404) && matches!(self.code.as_deref(), Some("NoSuchKey" | "NotFound"))
    }
}

/// Whether there are no credentials that can be used. That they could not be fetched passes.
fn is_denial(error: &(dyn Error + 'static)) -> bool {
    matches!(
        error.downcast_ref(),
        Some(CredentialsError::CredentialsNotLoaded(_) | CredentialsError::InvalidConfiguration(_))
    )
}

/// What the SDK knows of this machine and its user, and of the location.
async fn load(location: &S3Location, limits: Limits) -> SdkConfig {
    let http = Builder::new()
        .tls_provider(tls::Provider::Rustls(CryptoMode::Ring))
        .build_https();
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(limits.connect)
        // One that says nothing leaves time to ask again.
        .read_timeout(limits.call / limits.tries.max(1))
        .build();
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http.clone())
        .timeout_config(timeouts)
        .retry_config(RetryConfig::standard().with_max_attempts(limits.tries))
        .stalled_stream_protection(
            StalledStreamProtectionConfig::enabled()
                .grace_period(STALLED)
                .build(),
        );
    if let Some(endpoint) = &location.endpoint {
        loader = loader.endpoint_url(endpoint);
    }
    let region = region(location);
    if let Some(region) = region.clone() {
        loader = loader.region(region);
    }
    if location.anonymous {
        loader = loader.no_credentials();
    } else if let Some(profile) = &location.profile {
        // By name only: what the environment holds is for somebody else.
        let provider = ProviderConfig::without_region().with_http_client(http);
        let credentials = ProfileFileCredentialsProvider::builder()
            .configure(&provider)
            .profile_name(profile)
            .build();
        loader = loader
            .profile_name(profile)
            .credentials_provider(credentials);
    }
    loader.load().await
}

/// The region, where asking for it can be left out: outside of AWS it is only part of the signature.
fn region(location: &S3Location) -> Option<Region> {
    let given = location.region.clone().map(Region::new);
    let anything = || Region::from_static(ANY_REGION);
    let is_told = REGIONS.iter().any(|name| env::var_os(name).is_some());
    let untold = is_elsewhere(location) && !is_told && location.profile.is_none();
    given.or_else(|| untold.then(anything))
}

/// Whether it is not AWS that is asked.
fn is_elsewhere(location: &S3Location) -> bool {
    location.endpoint.is_some() || env::var_os("AWS_ENDPOINT_URL_S3").is_some()
}

/// What it comes down to: `connection refused` says more than that dispatching failed.
fn innermost(error: &(dyn Error + 'static)) -> String {
    sources(error)
        .last()
        .map(ToString::to_string)
        .unwrap_or_default()
}

fn sources<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| {
        (*error).source()
    })
}

fn size(length: Option<i64>) -> u64 {
    length
        .and_then(|length| u64::try_from(length).ok())
        .unwrap_or_default()
}

fn time(modified: Option<&DateTime>) -> Option<SystemTime> {
    let seconds = modified.and_then(|time| u64::try_from(time.secs()).ok())?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}
