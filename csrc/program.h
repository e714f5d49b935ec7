// A recorded sequence of kernel calls. Running it again costs no more than the kernels: no argument is checked, nothing
// is allocated, no other language is involved. The pointers must still be valid, and what lies behind them may differ.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace speculative_mamba {

using Call = std::function<void(intptr_t where)>;

class Program {
 public:
    void run(intptr_t where) const {
        for (const Call& call : calls_) call(where);
    }

    size_t size() const { return calls_.size(); }

    // Calls submitted by this thread are added to `program` from now on, which lives meanwhile; with null no more.
    static void record(std::shared_ptr<Program> program) { recording() = std::move(program); }

    // Runs a call, and records it if that was asked for.
    static void submit(Call call, intptr_t where) {
        call(where);
        if (recording()) recording()->calls_.push_back(std::move(call));
    }

 private:
    static std::shared_ptr<Program>& recording() {
        thread_local std::shared_ptr<Program> program;
        return program;
    }

    std::vector<Call> calls_;
};

}  // namespace speculative_mamba
