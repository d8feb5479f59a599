//! The list of a model's parameters: names, shapes, initialisers and scopes.

use crate::Init;

/// A parameter of a model: an index into its [`Parameters`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub usize);

/// A block of a model whose parameters are used together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ScopeId(pub usize);

/// What is known of a parameter before it has a value.
#[derive(Clone, Debug)]
pub struct ParamSpec {
    /// Dotted path, for example `blocks.3.attn.qkv.weight`.
    pub name: String,
    pub shape: Vec<usize>,
    pub init: Init,
    pub scope: ScopeId,
    /// Frozen parameters have no gradient and no optimizer state.
    pub trainable: bool,
}

impl ParamSpec {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All parameters of a model in the order in which forward uses them.
#[derive(Clone, Debug, Default)]
pub struct Parameters {
    specs: Vec<ParamSpec>,
    scopes: Vec<String>,
}

impl Parameters {
    pub fn len(&self) -> usize {
        self.specs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.specs.is_empty()
    }

    pub fn spec(&self, id: ParamId) -> &ParamSpec {
        &self.specs[id.0]
    }

    pub fn iter(&self) -> impl Iterator<Item = (ParamId, &ParamSpec)> {
        self.specs.iter().enumerate().map(|(index, spec)| (ParamId(index), spec))
    }

    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.specs.iter().position(|spec| spec.name == name).map(ParamId)
    }

    /// Names of the scopes, by [`ScopeId`].
    pub fn scopes(&self) -> &[String] {
        &self.scopes
    }

    /// Elements of all parameters.
    pub fn elements(&self) -> usize {
        self.specs.iter().map(ParamSpec::elements).sum()
    }
}

/// Collects parameters while a model is described.
#[derive(Debug, Default)]
pub struct Builder {
    parameters: Parameters,
    path: Vec<String>,
    scope: Option<ScopeId>,
}

impl Builder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Describes a block: `name` joins the path, and the parameters inside form a scope.
    ///
    /// # Panics
    /// If scopes are nested.
    pub fn scope<T>(&mut self, name: &str, describe: impl FnOnce(&mut Self) -> T) -> (ScopeId, T) {
        assert!(self.scope.is_none(), "scopes do not nest: {name}");
        let id = ScopeId(self.parameters.scopes.len());
        self.parameters.scopes.push(name.into());
        self.scope = Some(id);
        let described = describe(self);
        self.scope = None;
        (id, described)
    }

    /// Describes a part: `name` joins the path of the parameters inside.
    pub fn at<T>(&mut self, name: &str, describe: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(name.into());
        let described = describe(self);
        self.path.pop();
        described
    }

    /// Adds a trainable parameter under the present path.
    pub fn add(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        self.push(name, shape, init, true)
    }

    /// Adds a parameter that is never trained.
    pub fn add_frozen(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        self.push(name, shape, init, false)
    }

    fn push(&mut self, name: &str, shape: &[usize], init: Init, trainable: bool) -> ParamId {
        let scope = self.scope.expect("every parameter belongs to a scope");
        let mut path = self.path.clone();
        path.push(name.into());
        let name = path.join(".");
        assert!(self.parameters.find(&name).is_none(), "{name} was described twice");
        self.parameters.specs.push(ParamSpec { name, shape: shape.to_vec(), init, scope, trainable });
        ParamId(self.parameters.specs.len() - 1)
    }

    pub fn finish(self) -> Parameters {
        self.parameters
    }
}
