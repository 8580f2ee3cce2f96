{
  description = "psyche-fast: a fast trainer for low-communication LLM training";

  # Only the interpreter, the compilers and the C++ library come from here; torch and the rest come
  # from PyPI at the versions of constraints.txt, as without Nix.
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.05";

  outputs =
    { self, nixpkgs }:
    let
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];

      # What the wheels of torch, numpy and pyarrow link to but do not bring.
      libraries = pkgs: ''
        export LD_LIBRARY_PATH="${
          pkgs.lib.makeLibraryPath [
            pkgs.stdenv.cc.cc.lib
            pkgs.zlib
          ]
        }''${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        if [ -d /run/opengl-driver/lib ]; then # NixOS keeps the GPU's driver there
          export LD_LIBRARY_PATH="$LD_LIBRARY_PATH:/run/opengl-driver/lib"
          export TRITON_LIBCUDA_PATH=/run/opengl-driver/lib
        fi
      '';

      # nix run . -- train --model ...
      #
      # nixpkgs has other versions of torch and Transformers than are tested: uv installs those of
      # uv.lock, once for each version of this flake, into the user's cache.
      packageFor =
        pkgs:
        pkgs.writeShellApplication {
          name = "psyche-fast";
          runtimeInputs = [
            pkgs.python311
            pkgs.gcc # triton compiles its launchers with it
            pkgs.uv
          ];
          text = ''
            unset PYTHONPATH SOURCE_DATE_EPOCH # Nix's Python sets both
            ${libraries pkgs}
            cache="''${XDG_CACHE_HOME:-$HOME/.cache}/psyche_fast"
            export UV_PROJECT_ENVIRONMENT="$cache/nix-${builtins.baseNameOf "${self}"}"
            exec uv run --quiet --project ${self} --frozen --no-dev --no-editable \
              --python python3.11 psyche-fast "$@"
          '';
        };

      # nix develop .#dev-python --command psyche-fast train --model ...
      #
      # The name is that of Psyche's shell. There is no Rust to rebuild: where Psyche's command goes
      # on with `cargo run --features python --example train --`, ours goes on with
      # `psyche-fast train`, with the same flags.
      shellFor =
        pkgs:
        pkgs.mkShell {
          name = "psyche-fast";
          packages = [
            pkgs.python311
            pkgs.gcc # triton compiles its launchers with it
            pkgs.git
            pkgs.gnumake
          ];
          shellHook = ''
            # Nix's Python sets both; the first would leak into .venv, and with the second, which
            # lies before 1980, no wheel can be packed.
            unset PYTHONPATH SOURCE_DATE_EPOCH
            ${libraries pkgs}
            root=$(git rev-parse --show-toplevel 2>/dev/null || pwd)
            # Prints nothing when .venv is up to date; standard output belongs to --command.
            make --silent --no-print-directory -C "$root" setup PYTHON=python3.11 >&2 || exit 1
            export PATH="$root/.venv/bin:$PATH"
          '';
        };

      each =
        make:
        builtins.listToAttrs (
          map (system: {
            name = system;
            value = make system;
          }) systems
        );

      shells =
        system:
        let
          shell = shellFor nixpkgs.legacyPackages.${system};
        in
        {
          dev-python = shell;
          default = shell;
        };
    in
    {
      packages = each (system: {
        default = packageFor nixpkgs.legacyPackages.${system};
      });
      apps = each (system: {
        default = {
          type = "app";
          program = "${self.packages.${system}.default}/bin/psyche-fast";
        };
      });
      devShells = each shells;
    };
}
